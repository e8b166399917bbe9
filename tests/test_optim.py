"""Optimiser groups, schedule and clipping."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import small_segmentor
from torch import nn

from infoclip.config import OptimConfig
from infoclip.engine.optim import (
    allocate_moments,
    build_optimizer,
    clip_gradients,
    lr_factor,
    parameter_groups,
    set_learning_rate,
)


class Objective(nn.Module):
    """Stands in for the alignment objective."""

    def __init__(self) -> None:
        super().__init__()
        self.lpam = nn.ModuleDict({"norm": nn.LayerNorm(4), "q": nn.Linear(4, 4)})


def groups_by_name(config: OptimConfig, tune: str = "full") -> dict[str, dict]:
    segmentor = small_segmentor()
    segmentor.clip.parameter_policy(tune)
    return {g["name"]: g for g in parameter_groups(segmentor, Objective(), config)}


def test_groups() -> None:
    config = OptimConfig(
        lr=1e-3, clip_lr_multiplier=0.1, lpam_lr_multiplier=2.0, weight_decay=0.3, weight_decay_norm=0.2
    )
    groups = groups_by_name(config)
    rates = {name: (g["lr"], g["weight_decay"], g["kind"]) for name, g in groups.items()}
    assert rates == {
        "head": (1e-3, 0.3, "head"),
        "head.norm": (1e-3, 0.2, "head"),
        "clip": (1e-4, 0.3, "clip"),
        "clip.norm": (1e-4, 0.2, "clip"),
        "clip.embedding": (1e-4, 0.0, "clip"),
        "lpam": (2e-3, 0.3, "lpam"),
        "lpam.norm": (2e-3, 0.2, "lpam"),
    }
    assert groups["clip.embedding"]["param_names"] == ["clip.token_embedding.weight"]
    assert groups["lpam"]["param_names"] == ["objective.lpam.q.weight", "objective.lpam.q.bias"]
    head = groups["head"]["param_names"]
    # Biases, padding tokens and plain parameters are decayed, as published.
    for name in ("layers.0.attention.padding_tokens", "conv1.bias", "layers.0.attention.padding_guidance"):
        assert f"aggregator.{name}" in head
    assert {"upsample1.weight", "upsample2.bias"} <= set(head)
    assert "aggregator.decoder1.conv.double_conv.1.weight" in groups["head.norm"]["param_names"]
    assert "clip.visual.ln_post.bias" in groups["clip.norm"]["param_names"]
    assert "clip.positional_embedding" in groups["clip"]["param_names"]


def test_every_learning_parameter_is_in_exactly_one_group() -> None:
    for tune in ("attention", "full", "frozen"):
        segmentor = small_segmentor()
        segmentor.clip.parameter_policy(tune)  # type: ignore[arg-type]
        objective = Objective()
        objective.shared = segmentor.aggregator.head  # type: ignore[assignment]
        groups = parameter_groups(segmentor, objective, OptimConfig())
        listed = [id(p) for g in groups for p in g["params"]]
        assert len(listed) == len(set(listed))
        modules = (segmentor, objective)
        assert set(listed) == {id(p) for m in modules for p in m.parameters() if p.requires_grad}
        assert all(len(g["params"]) == len(g["param_names"]) > 0 for g in groups)
    names = [n for g in groups for n in g["param_names"]]
    assert not any(n.startswith("clip.") for n in names)


def test_published_tuning_groups() -> None:
    groups = groups_by_name(OptimConfig(), "attention")
    assert set(groups) == {"head", "head.norm", "clip", "lpam", "lpam.norm"}
    assert all(n.endswith(("q_proj_weight", "v_proj_weight")) for n in groups["clip"]["param_names"])
    assert groups["clip"]["lr"] == pytest.approx(2e-6)


def test_optimizer_steps_and_schedule() -> None:
    segmentor = small_segmentor()
    segmentor.clip.parameter_policy("attention")
    optimizer = build_optimizer(segmentor, None, OptimConfig())
    before = {n: p.detach().clone() for n, p in segmentor.named_parameters()}
    for parameter in segmentor.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    set_learning_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["clip"] == pytest.approx(1e-6)
    optimizer.step()
    moved = {n: (before[n] - p).abs().max().item() for n, p in segmentor.named_parameters()}
    for name, parameter in segmentor.named_parameters():
        # The first Adam step has the size of the learning rate; decay and rounding of values near 1 add a little.
        rate = 0.0 if not parameter.requires_grad else 1e-6 if name.startswith("clip.") else 1e-4
        assert moved[name] == pytest.approx(rate, rel=0.15, abs=1e-12), name
    set_learning_rate(optimizer, 1.0)  # from the first rate, not from the last one
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["head"] == pytest.approx(2e-4)
    copy = build_optimizer(segmentor, None, OptimConfig())
    copy.load_state_dict(optimizer.state_dict())
    assert [g["name"] for g in copy.param_groups] == [g["name"] for g in optimizer.param_groups]


def test_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="nothing to optimise"):
        build_optimizer(small_segmentor().requires_grad_(False), None, OptimConfig())


def test_schedule() -> None:
    assert [lr_factor(k, 4) for k in range(6)] == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.1464466, 0, 0])
    assert [lr_factor(k, 4, "constant") for k in range(6)] == [1.0] * 6
    # FC-CLIP's 368,750 steps, with a tenth at 327,778 and a hundredth at 355,092
    edges = [0, 327_777, 327_778, 355_092, 355_093]
    assert [lr_factor(k, 368_750, "step") for k in edges] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [lr_factor(k, 10, "constant", 3) for k in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert lr_factor(1, 10, "cosine", 3) == pytest.approx(0.5 * lr_factor(1, 10))
    for bad in ({"step": -1, "steps": 1}, {"step": 0, "steps": 0}, {"step": 0, "steps": 1, "warmup_steps": -1}):
        with pytest.raises(ValueError, match="expected 0 or more"):
            lr_factor(**bad)
    with pytest.raises(ValueError, match="expected 'cosine', 'poly', 'step' or 'constant'"):
        lr_factor(0, 1, "linear")  # type: ignore[arg-type]


def toy_groups() -> list[dict]:
    values = {"head": [3.0, 4.0], "clip": [12.0], "lpam": [0.001]}
    groups = []
    for kind, gradient in values.items():
        parameter = nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        groups.append({"kind": kind, "params": [parameter, nn.Parameter(torch.zeros(1))]})
    return groups


def gradients(groups: list[dict]) -> list[list[float]]:
    return [g["params"][0].grad.tolist() for g in groups]


def test_joint_clipping() -> None:
    groups = toy_groups()
    norms = clip_gradients(groups, 1.3)
    assert norms.keys() == {"joint"}
    assert norms["joint"].item() == pytest.approx(13)
    flat = [x for g in gradients(groups) for x in g]
    assert flat == pytest.approx([0.3, 0.4, 1.2, 0.0001], rel=1e-5)


def test_group_clipping() -> None:
    groups = toy_groups()
    norms = clip_gradients(groups, 1.0, "group")
    assert {k: v.item() for k, v in norms.items()} == pytest.approx({"head": 5, "clip": 12, "lpam": 0.001})
    flat = [x for g in gradients(groups) for x in g]
    assert flat == pytest.approx([0.6, 0.8, 1.0, 0.001], rel=1e-5)


def test_measuring_without_clipping() -> None:
    groups = toy_groups()
    assert clip_gradients(groups, 0)["joint"].item() == pytest.approx(13)
    assert gradients(groups) == [[3.0, 4.0], [12.0], [pytest.approx(0.001)]]
    with pytest.raises(ValueError, match="expected 'joint' or 'group'"):
        clip_gradients(groups, 1, "each")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 0 or more"):
        clip_gradients(groups, -1)


def test_clipping_shows_what_is_not_finite() -> None:
    groups = toy_groups()
    groups[0]["params"][0].grad[0] = math.nan
    assert math.isnan(clip_gradients(groups, 1.0)["joint"].item())


@pytest.mark.parametrize("fused", [True, False])
def test_moments_made_before_the_first_step_are_those_that_it_makes(fused: bool) -> None:
    ends = []
    for early in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(4))]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        if early:
            allocate_moments(optimizer)
            kept = [optimizer.state[p]["exp_avg"] for p in parameters]
            allocate_moments(optimizer)  # those that are there stay
            assert all(optimizer.state[p]["exp_avg"] is x for p, x in zip(parameters, kept, strict=True))
        for step in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.randn_like(p) if i < 2 or step else None  # one that learns later
            optimizer.step()
        ends.append((parameters, [optimizer.state[p] for p in parameters]))
    for a, b in zip(ends[0][0], ends[1][0], strict=True):
        assert torch.equal(a, b)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert one.keys() == other.keys()
        for name, x in one.items():
            assert (x.dtype, x.device) == (other[name].dtype, other[name].device)
            assert torch.equal(x, other[name])
