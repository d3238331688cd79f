"""Rules over logs whose state is known: the right sentence, since the right step, and silence over healthy ones."""

import math

import pytest

from nnssl_ext.monitors.derived import with_trends
from nnssl_ext.monitors.diagnosis import Rule, diagnose
from nnssl_ext.monitors.rules import RULES

STEPS = 25

HEALTHY_DINO = {
    "loss": 9.0,
    "dino": 5.5,
    "ibot": 3.5,
    "dino_of_ln_k": 0.8,
    "teacher_entropy": 0.6,
    "prototypes_entropy": 0.9,
    "patch_entropy": 0.8,
    "patch_prototypes_entropy": 0.99,
    "momentum": 0.996,
    "teacher_temperature": 0.04,
    "teacher_distance": 0.03,
    "lr": 1e-3,
    "weight_growth": 1.01,
    "skipped": 0,
    "effective_rank": 20.0,
    "feature_spread": 0.8,
    "token_similarity": 0.1,
    "token_variance_share": 0.9,
    "grad_share_dino": 0.6,
    "grad_share_ibot": 0.4,
    "grad_cosine_dino_ibot": 0.05,
    "probe_dice": 0.3,
    "probe_dice_random": 0.12,
}
HEALTHY_SIMSIAM = {
    "loss": -0.6,
    "iou": 0.43,
    "projector_collapse": 0.01,
    "predictor_collapse": 0.1,
    "projector_rank": 12.0,
    "predictor_rank": 9.0,
    "lr": 1e-3,
    "weight_growth": 1.0,
    "skipped": 0,
    "effective_rank": 10.0,
}


def log(base, number=12, since=4, **changes):
    """Rows of a healthy run in which figures change for good at row `since`; a function changes with the row."""
    rows = []
    for epoch in range(number):
        row = {"epoch": epoch, "step": STEPS * (epoch + 1), **base}
        if epoch >= since:
            row |= {name: value(epoch) if callable(value) else value for name, value in changes.items()}
        rows.append({name: value for name, value in row.items() if not math.isnan(value)})
    return rows


@pytest.mark.parametrize("base", [HEALTHY_DINO, HEALTHY_SIMSIAM])
def test_healthy_runs_are_left_alone(base):
    assert diagnose(log(base), RULES) == []
    assert diagnose([], RULES) == []


UNIFORM = {"teacher_entropy": 0.999, "prototypes_entropy": 0.9995, "dino_of_ln_k": 1.0, "dino": 6.93}
CASES = [
    (HEALTHY_DINO, UNIFORM, "uniform teacher", ("1.000", "uniform", "temperature")),
    (
        HEALTHY_DINO,
        {"teacher_entropy": 1e-4, "prototypes_entropy": 2e-4, "dino_of_ln_k": 0.001},
        "constant teacher",
        ("centring",),
    ),
    (HEALTHY_DINO, {"patch_entropy": 0.99, "patch_prototypes_entropy": 0.991}, "uniform token targets", ("iBOT",)),
    (HEALTHY_DINO, {"patch_entropy": 0.3, "patch_prototypes_entropy": 0.301}, "constant token targets", ("0.300",)),
    (HEALTHY_DINO, {"momentum": 0.0, "teacher_distance": 0.0}, "no teacher momentum", ("momentum is 0",)),
    (HEALTHY_DINO, {"teacher_distance": 0.0}, "teacher shares the student's weights", ("0.996", "storage")),
    (HEALTHY_DINO, {"weight_growth": 3.0}, "learning rate too high", ("3-fold", "--optim.lr")),
    (HEALTHY_DINO, {"skipped": 4}, "non-finite steps", ("4 step(s)",)),
    (HEALTHY_DINO, {"grad_share_ibot": 0.93, "grad_share_dino": 0.07}, "ibot dominates", ("share 0.93",)),
    (HEALTHY_DINO, {"grad_cosine_dino_ibot": -0.7}, "terms pull apart", ("-0.70",)),
    (HEALTHY_DINO, {"token_variance_share": 0.01, "token_similarity": 0.99}, "spatial collapse", ("1.0%",)),
    (HEALTHY_DINO, {"effective_rank": 1.2}, "features on one line", ("1.20",)),
    (HEALTHY_DINO, {"effective_rank": 5.0}, "rank falls", ("25%",)),
    (HEALTHY_DINO, {"probe_dice": 0.2}, "probe falls", ("0.200", "0.100")),
    (HEALTHY_DINO, {"probe_dice": 0.05}, "probe below random", ("0.050", "0.120")),
    (HEALTHY_SIMSIAM, {"predictor_collapse": 0.9}, "collapsed predictor", ("0.90",)),
    (HEALTHY_SIMSIAM, {"projector_collapse": 0.9}, "collapsed projector", ("0.90",)),
    (HEALTHY_SIMSIAM, {"projector_rank": 1.5}, "projector on a few lines", ("1.50",)),
    (HEALTHY_SIMSIAM, {"predictor_rank": 12.0}, "no predictor", ("Table 1",)),
    (HEALTHY_SIMSIAM, {"iou": 0.0}, "pairs do not overlap", ("0.000", "--iou 0.3 0.6")),
]


@pytest.mark.parametrize(("base", "changes", "rule", "words"), CASES, ids=[case[2] for case in CASES])
def test_what_is_wrong_is_named_with_evidence_since_its_step(base, changes, rule, words):
    found = {finding.rule: finding for finding in diagnose(log(base, number=16, **changes), RULES)}
    assert rule in found
    assert found[rule].step == STEPS * 5
    sentence = str(found[rule]) + next(r.source for r in RULES if r.name == rule)
    assert all(word in sentence for word in words), sentence
    assert rule not in {f.rule for f in diagnose(log(base, number=16, since=16, **changes), RULES)}


def test_flat_dino_beside_a_moving_ibot_and_a_rising_ibot():
    flat = {"dino_of_ln_k": 0.97, "ibot": lambda epoch: 3.5 - 0.02 * epoch}
    assert "DINO flat, iBOT moves" in {f.rule for f in diagnose(log(HEALTHY_DINO, 20, 0, **flat), RULES)}
    moving = flat | {"dino": lambda epoch: 6.5 - 0.02 * epoch}
    assert "DINO flat, iBOT moves" not in {f.rule for f in diagnose(log(HEALTHY_DINO, 20, 0, **moving), RULES)}
    rising = {"ibot": lambda epoch: 3.0 + 0.1 * epoch}
    assert "iBOT rises" in {f.rule for f in diagnose(log(HEALTHY_DINO, 20, 0, **rising), RULES)}
    # of a healthy run (probe .12 to .40): the teacher's answers had nearly all become one, then told places apart again
    richer = {"ibot": lambda epoch: 1.16 + 0.1 * epoch, "patch_entropy": lambda epoch: 0.074 + 0.035 * epoch}
    assert "iBOT rises" not in {f.rule for f in diagnose(log(HEALTHY_DINO, 20, 0, **richer), RULES)}


def test_a_passing_state_is_a_warning_and_a_lasting_one_an_alarm():
    def severity(rows):
        return {f.rule: f.severity for f in diagnose(rows, RULES)}.get("uniform teacher")

    assert [severity(log(HEALTHY_DINO, number=4 + lasted, **UNIFORM)) for lasted in (2, 3, 9, 10)] == [
        None,
        "warning",
        "warning",
        "alarm",
    ]


def test_rows_without_a_figure_are_passed_over_and_alarms_come_first():
    rule = Rule("r", "warning", {"probe_dice": (0.0, 0.1)}, "{probe_dice}", "", "", lasting=2)
    alarm = Rule("a", "alarm", {"step": (0.0, math.inf)}, "", "", "", lasting=1)
    rows = [
        {"step": s} | ({"probe_dice": d} if d is not None else {}) for s, d in enumerate((0.5, 0.05, None, 0.04, None))
    ]
    assert [(f.rule, f.step) for f in diagnose(rows, [rule, alarm])] == [("a", 0), ("r", 1)]
    assert [f.rule for f in diagnose(rows[:3], [rule])] == []
    late = Rule("l", "alarm", {"step": (0.0, math.inf)}, "", "", "", lasting=2, after=4)
    assert diagnose(rows, [late]) == []


def test_trends_by_hand():
    rows = [
        {"step": 1, "weight_growth": 1.5, "ibot": 2.0, "patch_entropy": 0.5, "effective_rank": 4.0, "probe_dice": 0.2},
        {
            "step": 2,
            "weight_growth": 1.0,
            "ibot": 1.0,
            "effective_rank": 8.0,
            "grad_cosine_a_b": 0.5,
            "grad_cosine_a_c": -0.1,
        },
        {
            "step": 3,
            "weight_growth": 1.1,
            "ibot": 1.5,
            "patch_entropy": 0.75,
            "effective_rank": 2.0,
            "probe_dice": 0.1,
            "probe_dice_random": 0.3,
        },
    ]
    grown = with_trends(rows)
    assert [row["fastest_growth"] for row in grown] == [1.5, 1.5, 1.5]
    assert [row["ibot_of_lowest"] for row in grown] == [1, 1, 1.5]
    assert [row.get("patch_entropy_of_lowest") for row in grown] == [1, None, 1.5]
    assert [row["rank_of_highest"] for row in grown] == [1, 1, 0.25]
    assert [row.get("lowest_cosine") for row in grown] == [None, -0.1, None]
    assert grown[2]["probe_loss"] == pytest.approx(0.1) and grown[2]["probe_gain"] == pytest.approx(-0.2)
    assert "probe_loss" not in grown[1] and "information" not in grown[0]


def test_every_rule_has_a_source_a_remedy_and_a_name_of_its_own():
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.source and rule.remedy and rule.when for rule in RULES)
