"""The edits that add an SDE kind, a ratio_norm, a number of the objective, or an operand.

Each list is complete: a copy of the tree with its edits has the addition in every language and on
every backend. docs/life-of-a-call.md shows the lists; tests/test_life_of_a_call.py applies them to
a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A text that stands once in a file, and the text that replaces it."""

    path: str
    old: str
    new: str
    what: str  # what docs/life-of-a-call.md says of it

    def apply(self, root: Path) -> None:
        file = root / self.path
        text = file.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.path} has {text.count(self.old)} times {self.old!r}")
        file.write_text(text.replace(self.old, self.new))


# It has s = eta sigma sqrt(-dt).
SDE_KIND = [
    Edit(
        "guard_ops/schedule.py",
        '"wan_sde", "cps"]',
        '"wan_sde", "cps", "linear_sde"]',
        "the name, for type checkers",
    ),
    Edit(
        "guard_ops/schedule.py",
        '    "cps": SdeRule(',
        '    "linear_sde": SdeRule(\n'
        "        lambda sigma, following, eta, largest: eta * sigma, _diffusion_mean,\n"
        "        diffusion=True, gaussian=True, largest_noise_level=2.0,\n"
        "    ),\n"
        '    "cps": SdeRule(',
        "the record: std, mean rule, Gaussian or not, bound",
    ),
]

# It makes r_hat = 1 + (u - mean(u)) / (1 + std(u)).
RATIO_NORM = [
    Edit(
        "guard_ops/config.py",
        "RatioNorm = Literal[",
        'RatioNorm = Literal["robust", ',
        "the name",
    ),
    Edit(
        "guard_ops/config.py",
        "RATIO_NORMS: dict[RatioNorm, NormNeeds] = {\n",
        "RATIO_NORMS: dict[RatioNorm, NormNeeds] = {\n"
        '    "robust": NormNeeds(statistics=True, debiased=False),\n',
        "what it has to know",
    ),
    Edit(
        "guard_ops/objective.py",
        '    if config.ratio_norm == "standardize":\n',
        '    if config.ratio_norm == "robust":\n'
        "        return torch.where(finite, (u - mean) / (1 + std), 0.0), degenerate\n"
        '    if config.ratio_norm == "standardize":\n',
        "`normalize`",
    ),
    Edit(
        "csrc/objective.h",
        "X(none, false, false)",
        "X(robust, true, false) X(none, false, false)",
        "the enum",
    ),
    Edit(
        "csrc/objective.h",
        "  if (c.ratio_norm == RatioNorm::none) return",
        "  if (c.ratio_norm == RatioNorm::robust) {\n"
        "    const double distance = r.u - of.mean, outer = 1.0 / (1.0 + of.std);\n"
        "    return {outer * distance, outer, 1.0 + r.u, outer * distance};\n"
        "  }\n"
        "  if (c.ratio_norm == RatioNorm::none) return",
        "`normalize`",
    ),
    Edit(
        "kernels/objective.py",
        'NONE = _choice("ratio_norm", "none")\n',
        'NONE = _choice("ratio_norm", "none")\nROBUST = _choice("ratio_norm", "robust")\n',
        "its number",
    ),
    Edit(
        "kernels/objective.py",
        "    elif mode.ratio_norm == STANDARDIZE:\n",
        "    elif mode.ratio_norm == ROBUST:\n"
        "        outer, inner = 1.0 / (1.0 + std) + tl.zeros_like(u), 1.0 + u\n"
        "        excess = outer * (u - mean)\n"
        "        by_std = excess\n"
        "    elif mode.ratio_norm == STANDARDIZE:\n",
        "`normalize`",
    ),
]

# It multiplies every advantage by `adv_scale`.
NUMBER = [
    Edit(
        "guard_ops/config.py",
        '    "adv_clip": (False, True),\n',
        '    "adv_clip": (False, True),\n    "adv_scale": (False, False),\n',
        "the name and its bounds",
    ),
    Edit(
        "guard_ops/config.py",
        "    adv_clip: float = 5.0\n",
        "    adv_clip: float = 5.0\n    adv_scale: float = 1.0\n",
        "the field and its default",
    ),
    Edit(
        "guard_ops/objective.py",
        "    a = advantages.clamp(-config.adv_clip, config.adv_clip)\n",
        "    a = config.adv_scale * advantages.clamp(-config.adv_clip, config.adv_clip)\n",
        "where it is used",
    ),
    Edit(
        "csrc/objective.h",
        "X(adv_clip) X(",
        "X(adv_clip) X(adv_scale) X(",
        "the name",
    ),
    Edit(
        "csrc/objective.h",
        "  out.loss = -a * (1.0 + (out.clipped ? bounded : excess));\n"
        "  out.slope = out.clipped ? 0.0 : -a;\n",
        "  out.loss = -(c.adv_scale * a) * (1.0 + (out.clipped ? bounded : excess));\n"
        "  out.slope = out.clipped ? 0.0 : -(c.adv_scale * a);\n",
        "where it is used",
    ),
    Edit(
        "kernels/objective.py",
        "    a = tl.where(a > adv_clip, adv_clip, a)\n",
        "    a = number(numbers.adv_scale) * tl.where(a > adv_clip, adv_clip, a)\n",
        "where it is used",
    ),
]

# `weight` [K, B, *latent], of 0 and 1, multiplies each element's `delta`, `e` and gradient.
OPERAND = [
    Edit(
        "guard_ops/transitions.py",
        "    noise: Tensor | None\n",
        "    noise: Tensor | None\n    weight: Tensor | None\n",
        "the list",
    ),
    Edit(
        "guard_ops/options.py",
        "    noise: Tensor | None  # [K, B, *latent]\n",
        "    noise: Tensor | None  # [K, B, *latent]\n"
        "    weight: Tensor | None  # [K, B, *latent]\n",
        "the keyword argument",
    ),
    Edit(
        "guard_ops/backends/reference.py",
        "    return _counted(t, delta), _counted(t, e)\n",
        "    if latents.weight is not None:\n"
        "        delta, e = delta * wide(latents.weight), e * wide(latents.weight)\n"
        "    return _counted(t, delta), _counted(t, e)\n",
        "its read, and its role in the formulas",
    ),
    Edit(
        "csrc/transition.h",
        "X(noise, noise)",
        "X(noise, noise) X(weight, weight)",
        "the list",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "v_old[tile], ref[tile];",
        "v_old[tile], ref[tile], weight[tile];",
        "room for a tile of it",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "  Source<R> v, x, y, m, v_old, noise, ref;",
        "  Source<R> v, x, y, m, v_old, noise, ref, weight;",
        "a tile has it",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "  Tile<R> in;\n",
        "  Tile<R> in;\n  if (t.weight) in.weight = stage(t.weight, at, j, n, buffers.weight);\n",
        "its read",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "      Vector<R> d = delta<F>(step, x), e = residual<F>(step, x);\n",
        "      Vector<R> d = delta<F>(step, x), e = residual<F>(step, x);\n"
        "      if (in.weight) d = where.any(in.weight) * d, e = where.any(in.weight) * e;\n",
        "its role in the sums",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "where.put_unrounded(to, step.b * departure<F>(step, x));",
        "where.put_unrounded(to, step.b * (in.weight ? e - d : departure<F>(step, x)));",
        "its role in a gradient that the sums write",
    ),
    Edit(
        "csrc/cpu/kernels.cpp",
        "      if (with_ref) g = fma(factors.k3",
        "      if (in.weight) g = where.any(in.weight) * g;\n"
        "      if (with_ref) g = fma(factors.k3",
        "its role in the gradient",
    ),
    Edit(
        "csrc/cuda/tiles.h",
        "role_old, role_noise, roles };",
        "role_old, role_noise, role_weight, roles };",
        "the role of a copy",
    ),
    Edit(
        "csrc/cuda/tiles.h",
        "  Roles read = with_ref ? velocity | bit(role_ref) : 0;\n",
        "  const Roles read = (with_ref ? velocity | bit(role_ref) : 0) | bit(role_weight);\n",
        "every gradient needs it",
    ),
    Edit(
        "csrc/cuda/tiles.h",
        "t.m ? &t.m : &t.v_old, &t.noise};",
        "t.m ? &t.m : &t.v_old, &t.noise, &t.weight};",
        "its read",
    ),
    Edit(
        "csrc/cuda/tile_math.h",
        "  float s1 = 0, s2 = 0;\n",
        "  float s1 = 0, s2 = 0, weight[lane_elements];\n"
        "  const bool weighted = layout.has(role_weight);\n"
        "  if (weighted) read_role(layout, role_weight, slot, weight);\n",
        "its read",
    ),
    Edit(
        "csrc/cuda/tile_math.h",
        "      if constexpr (F != Form::log_prob) s1 = fma(d, part(es, n), s1);\n"
        "      s2 = fma(d, d, s2);\n",
        "      const float w = weighted ? weight[first + n] * d : d;\n"
        "      if constexpr (F != Form::log_prob) s1 = fma(w, part(es, n), s1);\n"
        "      s2 = fma(w, d, s2);\n",
        "its role in the sums",
    ),
    Edit(
        "csrc/cuda/tile_math.h",
        "  if (layout.has(role_ref) && gradient.with_ref) {\n",
        "  if (layout.has(role_weight)) {\n"
        "    float weight[lane_elements];\n"
        "    read_role(layout, role_weight, slot, weight);\n"
        "    for (uint32_t e = 0; e < lane_elements; ++e) g[e] *= weight[e];\n"
        "  }\n"
        "  if (layout.has(role_ref) && gradient.with_ref) {\n",
        "its read, and its role in the gradient",
    ),
    Edit(
        "kernels/transition.py",
        "    return delta, e, departure\n",
        "    if t.weight is not None:\n"
        "        kept = load(t.weight, strides.weight, k, i, start, inside, T)\n"
        "        delta, e, departure = delta * kept, e * kept, departure * kept\n"
        "    return delta, e, departure\n",
        "its read, and its role in the formulas",
    ),
]

ADDITIONS = {
    "an SDE kind": SDE_KIND,
    "a `ratio_norm`": RATIO_NORM,
    "a number of the objective": NUMBER,
    "an operand over latents": OPERAND,
}
