"""The study's words: what follows from its tables. They are ours, and hold no measured number."""

SAID = """\
- **What is said of the ratio holds.** With the raw ratio its mean is below 1 and its spread grows
  from step to step, so that a clip of one width binds late steps and leaves early ones alone. The
  article's normalization makes every step alike, exactly and all through training, and its clip
  shares are nearly flat. The paper's takes away the bias, not the growth of the spread: that is
  weaker than what is claimed. Runs that train with the article's objective often have a raw mean at
  1 or above it.
- **Gold, Fréchet and diversity at the end favour the article everywhere**, though not each by more
  than the seeds differ; on digits its gold ends where it began.
- **On digits most of that is moving less.** There the article's proxy is far lower, and at equal
  proxy its gold, Fréchet and diversity are not told apart from plain's, or gold is a little lower.
  On text both guards pay less Fréchet for the same proxy with Flow-GRPO's sampler.
- **Higher gold at equal proxy is open** almost everywhere: most seeds lean to the guards' side, and
  they are too few to settle it.
- **A higher proxy** is what the paper's objective gives on text, and not on digits; the article's
  proxy is nowhere higher for certain.
- **Fréchet rises and diversity falls in every kind of run**, guarded or not; with the article's
  objective more slowly for each iteration."""

ABLATIONS_SAY = """\
With its defaults the article's gradient is that of an on-policy first update and, from the second
on, one divided by the ratio's small spread. A gradient norm of 1 leaves the first tiny beside the
others, and the proxy stalls. Both cures give the proxy back: a `max_grad_norm` below the first
update's norm, and a `target_std` of the ratio's own size with the clip made narrower by as much
(the same samples are clipped). On this seed the second gains as much proxy as plain and keeps far
more gold; the first gains less than plain. RatioNorm is what keeps gold: alone it gains more proxy
than with balancing. Balancing alone does as plain does here. `detach_stats=False` gains proxy too,
and loses gold for it."""

ADVICE = """\
- **Where the reward is a stand-in for what is wanted**, begin with `GuardConfig.article()`: on both
  tasks and both samplers it has moved least by the end, and its clip binds every step alike,
  whatever the model and the latent's size.
- **If its reward stalls**, it is the gradient's length: log the norm of the first update and of
  the later ones. Set `max_grad_norm` below the first
  ([why](writing-a-loop.md#learning-rate-and-gradient-norm)), or `target_std` to about the raw
  ratio's spread, with `clip_low` and `clip_high` a fifth of it. That is one seed's evidence, and
  with a faster reward comes over-optimization again: watch gold.
- **Where the reward has to rise fast**, `GuardConfig.paper()`: it keeps up with plain or nearly so,
  and pays no more for it in gold by what these runs can tell. Its clip is on a scale of the
  latent's size, and has to be chosen by the clip shares.
- **Keep [the monitor](monitor.md) on, and export the best checkpoint**, with any objective: each of
  them has runs here in which it raised its alarm.
- **Do not judge an objective at equal iterations.** Compare at equal reward, over seeds."""

CAVEATS = """\
Two tasks that fit on a processor, with networks of less than a million parameters and latents of 64
and 432 elements. Their judges are good for what they were made for, and nobody has looked at a
thousand samples. In the text task the words of a finished run often stay readable to an eye: it is
speckle that defeats the engine. Fréchet is over raw pixels (digits) or random directions of them
(text), so it says how far samples have moved, not how good they look. Settings such as the learning
rate are those with which plain works, alike for all three objectives; an objective that wants
others is at a disadvantage, which is what the ablations look at. Not in the study: the bias over
the whole batch that the published script takes; one objective of these operators cannot express it
([`bias_reduction="batch"`](swap-in.md) has it in the loops of the frameworks). Nor a learning rate
for each update: a gradient norm that binds in every update is the same to Adam."""
