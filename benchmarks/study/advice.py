"""The study's words: what follows from its tables. They are ours, and hold no number."""

SAID = """\
- **What is said of the ratio holds.** With the raw ratio its mean is below 1 and its spread grows
  from step to step, so that a clip of one width binds late steps and leaves early ones alone. The
  article's normalization makes every step alike, exactly and all through training, and its clip
  shares are nearly flat. The paper's takes away the bias, not the growth of the spread: that is
  weaker than what is claimed. Runs that train with the article's objective often have a raw mean at
  1 or above it.
- **Gold, Fréchet and diversity at the end favour the article everywhere**, though not each by more
  than the seeds differ; on digits its gold ends where it began.
- **Most of that is moving less.** At equal iterations the article's proxy is lower or no higher; at
  equal proxy its gold is not told apart from plain's in most columns, and where it is, it can be
  lower. The paper's objective is the one whose gold at equal proxy leans to the better side, and
  three seeds do not settle by how much.
- **A higher proxy is not what the guards give**: the paper's is higher in one column, lower in
  another, and the article's nowhere higher for certain.
- **Fréchet rises and diversity falls in every kind of run**, guarded or not; with the article's
  objective more slowly for each iteration."""

ABLATIONS_SAY = ""

ADVICE = ""

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
