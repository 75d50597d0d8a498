"""Latents of which each rank has a part: four gloo processes against one with whole latents.

Ranks 0 and 1 share latents, unevenly, and so do 2 and 3. Where statistics go over ranks as well,
each pair has half of the samples, and ranks 0 and 2, 1 and 3 exchange them.
"""

from __future__ import annotations

import forked_ranks
import pytest
import torch
import torch.distributed as dist
from problems import FORMS, problem, relative, run, without_advantages

import guard_ops as go

RANKS = 4
# Interpreted kernels would take minutes; of them and the emulated ones the other tests are enough.
BACKENDS = [name for name in ("reference", "cpu") if name in go.available_backends()]
LATENT = (8, 5, 8)
PARTS = (slice(0, 3), slice(3, 8))  # of the latents' first dimension
OFFSETS = (0, 3 * 5 * 8)
DTYPES = (torch.float32, torch.float64)
WHOLE = ("advantages", "coeffs", "seed", "old_log_prob", "guidance_scale")  # no latents
CONFIG = go.GuardConfig.article(kl_beta=0.1, clip_low=0.05, clip_high=0.05)


def cases():
    """(form, dtype, masked, over ranks)"""
    for form in FORMS:
        for dtype in DTYPES:
            yield form, dtype, False, False
            yield form, dtype, True, form in ("mean", "seeded")
    yield "velocity", torch.float32, False, True


def given_of(form, dtype, masked):
    given = problem(form, steps=2, latent=LATENT, dtype=dtype, reference=True, drift=0.3)
    if masked:
        generator = torch.Generator().manual_seed(1)
        given["mask"] = torch.rand((1, 4, *LATENT), generator=generator) < 0.6
        given["mask"][0, 1, PARTS[0]] = False  # nothing counts in one rank's part of a sample
        given["mask"][0, 2] = False  # nor anywhere in another's
    return given


def share(given, rank, samples):
    part = {}
    for name, value in given.items():
        if name not in WHOLE:
            value = value[:, :, PARTS[rank % 2]]
        if name == "advantages":
            value = value[samples]
        elif name not in ("coeffs", "guidance_scale"):
            value = value[:, samples]
        part[name] = value
    return part


def worker(rank):
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    shard = {"latent_group": pairs[rank // 2]}
    results = {}
    for backend in BACKENDS:
        for case in cases():
            form, dtype, masked, over_ranks = case
            with go.use_backend("reference"):
                given = given_of(form, dtype, masked)
            more = dict(shard)
            if form == "seeded":
                more["latent_offset"] = OFFSETS[rank % 2]
            samples = slice(2 * (rank // 2), 2 * (rank // 2) + 2) if over_ranks else slice(0, 4)
            if over_ranks:
                more["process_group"] = across[rank % 2]
            mine = share(given, rank, samples)
            with go.use_backend(backend):
                out, grad = run(mine, CONFIG, **more)
                pushed = go.guard_loss_and_grad(**mine, config=CONFIG, **more)
                ratio = go.log_ratio(
                    **{n: x for n, x in without_advantages(mine).items() if "ref" not in n},
                    **{n: x for n, x in more.items() if n != "process_group"},
                )
            results[(backend, *case)] = (
                out.loss.detach(), out.log_ratio, out.excess, out.kl, grad, pushed.grad, ratio[0]
            )  # fmt: skip
        with go.use_backend(backend):
            for masked in (False, True):
                results[backend, masked] = rollout(rank, masked, shard)
    return results


def rollout(rank, masked, shard):
    """A step of whole latents (rank: None), or of a rank's part; and its density again."""
    with go.use_backend("reference"):
        given = given_of("velocity", torch.float32, masked)
    names = ("model_output", "sample", "coeffs", "mask")
    given = {n: given[n] for n in names if n in given}
    offset = {}
    if rank is not None:
        given = share(given, rank, slice(0, 4))
        offset = {"latent_offset": OFFSETS[rank % 2]}
    step = go.sde_step(**given, seed=go.philox_seed(3, (2, 4)), **offset, **shard)
    density = go.log_prob(**given, prev_sample=step.prev_sample, **shard)
    return step.prev_sample, step.log_prob, density


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """What every rank got, from one start of the processes."""
    return forked_ranks.run(__name__, RANKS, tmp_path_factory.mktemp("shards"))


def name_of(case):
    form, dtype, masked, over_ranks = case
    name = f"{form}-{str(dtype).removeprefix('torch.')}"
    return name + "-masked" * masked + "-over-ranks" * over_ranks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(cases()), ids=name_of)
def test_ranks_with_parts_of_latents_are_one_with_whole_ones(backend, case, by_rank):
    form, dtype, masked, over_ranks = case
    with go.use_backend("reference"):
        given = given_of(form, dtype, masked)
    with go.use_backend(backend):
        whole, grad = run(given, CONFIG)
    results = [ranks[(backend, *case)] for ranks in by_rank]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if form == "log-prob" and dtype == torch.float32:
        tolerance = 1e-4  # its ratio is the difference of two numbers a thousand times as large
    for n, name in enumerate(("loss", "log_ratio", "excess", "kl")):
        for one, other in (0, 1), (2, 3):  # the same bits on the ranks that share a latent
            assert torch.equal(results[one][n], results[other][n])
        pairs = results[0][n], results[2][n]
        if over_ranks:
            got = torch.stack(pairs).mean() if name == "loss" else torch.cat(pairs, 1)
        else:
            assert torch.equal(*pairs)
            got = pairs[0]
        assert relative(got, getattr(whole, name).detach()) < tolerance, name
    for n in (4, 5):  # guard_loss's gradient, and guard_loss_and_grad's
        latents = [torch.cat([results[r][n], results[r + 1][n]], 2) for r in (0, 2)]
        got = torch.cat(latents, 1) / 2 if over_ranks else latents[0]
        assert relative(got, grad) < tolerance
        if masked:
            assert (got[~given["mask"].expand_as(got)] == 0).all()
    ratio = torch.cat([results[0][6], results[2][6]], 1) if over_ranks else results[0][6]
    assert relative(ratio, whole.log_ratio) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_shard_draws_its_own_part_of_the_noise(backend, masked, by_rank):
    with go.use_backend(backend):
        sample, log_prob, density = rollout(None, masked, {})
    first, second = (ranks[backend, masked] for ranks in by_rank[:2])
    got = torch.cat([first[0], second[0]], 2)
    # vectors of noise that begin elsewhere may round one value in a million otherwise
    assert (got - sample).abs().max() < 1e-6
    assert torch.equal(first[1], second[1])
    assert relative(first[1], log_prob) < 1e-6
    assert relative(first[2], density) < 1e-6


def test_an_offset_continues_the_noise_of_a_seed(backend):
    given = problem("seeded", steps=None, batch=2, latent=(2600,), dtype=torch.float32)
    v, x, coeffs = given["model_output"], torch.zeros_like(given["model_output"]), given["coeffs"]
    seed = go.philox_seed(11, (2,))
    whole = go.sde_step(v, x, coeffs, seed=seed).prev_sample
    for begin in (4, 1028, 2048):
        part = slice(begin, None)
        got = go.sde_step(v[..., part], x[..., part], coeffs, seed=seed, latent_offset=begin)
        assert (got.prev_sample - whole[..., part]).abs().max() < 1e-6
    other = go.sde_step(v[..., part], x[..., part], coeffs, seed=seed)
    assert (other.prev_sample - whole[..., part]).abs().max() > 0.1
    nothing = go.sde_step(v, x, coeffs, seed=seed, latent_offset=0)
    assert torch.equal(nothing.prev_sample, whole)


def test_an_offset_beyond_32_bits_is_an_offset(backend):
    """Element 2^35 has the counter 2^33, whose upper word is 2."""
    given = problem("seeded", steps=None, latent=(64,), dtype=torch.float32)
    with go.use_backend("reference"):
        expected = go.log_ratio(**without_advantages(given), latent_offset=2**35).log_ratio
    got = go.log_ratio(**without_advantages(given), latent_offset=2**35).log_ratio
    assert relative(got, expected) < 1e-4
    assert relative(go.log_ratio(**without_advantages(given)).log_ratio, expected) > 0.1


@pytest.mark.parametrize(
    "offset, error, message",
    [
        (6, ValueError, "`latent_offset` is 6; it needs a multiple of 4"),
        (-4, ValueError, "`latent_offset` is -4; it needs a multiple of 4 that is not negative"),
        (4.0, TypeError, r"`latent_offset` is 4.0 \(float\); it needs an int"),
        (True, TypeError, r"`latent_offset` is True \(bool\); it needs an int"),
    ],
)
def test_what_is_no_offset_is_refused(offset, error, message):
    given = problem("seeded")
    with pytest.raises(error, match=message):
        go.guard_loss(**given, latent_offset=offset)


def test_an_offset_is_one_of_seeded_noise_and_a_group_one_of_ranks():
    given = problem("noise")
    with pytest.raises(ValueError, match="`latent_offset` is given without `seed`"):
        go.guard_loss(**given, latent_offset=4)
    with pytest.raises(TypeError, match=r"`latent_group` is a str; it needs a torch.distributed.P"):
        go.guard_loss(**given, latent_group="all")
    step = (given["model_output"], given["model_output"], given["coeffs"])
    with pytest.raises(ValueError, match="`latent_offset` is given without `seed`"):
        go.sde_step(*step, latent_offset=4)
    with pytest.raises(TypeError, match="`latent_group` is a str"):
        go.sde_step(*step, latent_group="all")
    with pytest.raises(TypeError, match="`latent_group` is a str"):
        go.log_ratio(**without_advantages(given), latent_group="all")
