"""The study's words: what follows from its tables. They are ours, and hold no number."""

SAID = ""
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
