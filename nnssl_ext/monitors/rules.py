"""What the diagnosis engine knows. Causes come before the collapses they lead to.

Figures are columns of ``training_log.csv`` or `nnssl_ext.monitors.derived.with_trends`. "dino.md" and "methods.md" are the
references this project was built from. They and the papers say what a failure looks like, hardly ever from which number on:
the bounds are our choice wherever a rule's source does not give them, and so is how long each must hold. What is tested is in
``tests/test_monitors_real_runs.py``: in runs of 20 to 100 steps some settings that are broken on purpose are named, and in
healthy seeds of 60 steps nothing is found. How often longer runs are warned in vain, or not warned, was not measured.
"""

from __future__ import annotations

import math

from nnssl_ext.monitors.diagnosis import Rule

INF = math.inf

PASSING = 10
"""Epochs after which a uniform or constant teacher no longer counts as a passing state; our choice."""

CAUSES = (
    Rule(
        "teacher shares the student's weights",
        "alarm",
        {"teacher_distance": (0.0, 0.0), "momentum": (0.5, INF), "lr": (1e-12, INF), "step": (2.0, INF)},
        "the teacher's weights equal the student's exactly although its momentum is {momentum:.4g}",
        "give the teacher a deep copy: the two must share no storage",
        "our reasoning: a moving average of moving weights never equals them exactly, but before the first step",
        lasting=1,
    ),
    Rule(
        "no teacher momentum",
        "alarm",
        {"momentum": (0.0, 0.5)},
        "the teacher's momentum is {momentum:.3g}: it repeats what the student is, so both can agree on nothing",
        "raise the momentum to .99 or more (DINO: .996 to 1)",
        "BYOL (arXiv:2006.07733), Table 5a: momentum 0 collapses; DINO (arXiv:2104.14294), 5.2: a copied student too; .5 is our "
        "choice",
        lasting=1,
    ),
    Rule(
        "no predictor",
        "alarm",
        {"predictor_effect": (0.0, 0.0)},
        "predictions equal projections: there is no predictor, and loss {loss:.3f} is free to reach -1 by collapse",
        "put the predictor back: --predictor",
        "SimSiam (arXiv:2011.10566), Table 1: without it the accuracy is .1 %",
        lasting=1,
    ),
    Rule(
        "pairs do not overlap",
        "alarm",
        {"iou": (0.0, 0.01)},
        "the two crops of a pair have a mean IoU of {iou:.3f}: they show different tissue, yet shall look the same",
        "draw pairs with an IoU of .3 to .6: --iou 0.3 0.6",
        "methods.md 1: an IoU of 0 collapsed early (Dice .838 after fine-tuning, .843 from scratch, n = 4); .01 is our choice",
        lasting=1,
    ),
    Rule(
        "learning rate too high",
        "alarm",
        {"fastest_growth": (1.2, INF)},
        "the weights grew {fastest_growth:.3g}-fold within one epoch, at a learning rate of {lr:.2g}",
        "divide --optim.lr by 10, or warm up longer, and start anew",
        "1.2 is our choice: short healthy runs of SimSiam, DINO and MAE stay below, with 100 times their rate they go above",
        lasting=1,
    ),
    Rule(
        "non-finite steps",
        "warning",
        {"skipped": (1.0, INF)},
        "{skipped:.0f} step(s) were skipped because loss or gradient was not finite",
        "see the cases named in the output; lower --optim.lr; --precision 32",
        "dino.md 4, NaN",
        lasting=1,
    ),
)

COLLAPSES = (
    Rule(
        "uniform teacher",
        "alarm",
        {"teacher_entropy": (0.98, INF), "information": (-INF, 0.005)},
        "DINO loss stuck at ln K ({dino_of_ln_k:.3f} of it): teacher outputs are uniform, entropy {teacher_entropy:.3f} ln K",
        "check teacher temperature (lower, slower warm-up), centring (try sinkhorn), momentum and learning rate",
        "dino.md 4, rows 1 and 4; information 0 = the mean output is as sharp as each output; .98 and .005 are our choice",
        lasting=PASSING,
        early=3,
    ),
    Rule(
        "constant teacher",
        "alarm",
        {"teacher_entropy": (-INF, 0.98), "information": (-INF, 0.005)},
        "the teacher answers the same to every crop (entropy {teacher_entropy:.3f} ln K, of their mean "
        "{prototypes_entropy:.3f}), and the DINO loss of {dino_of_ln_k:.3f} ln K says nothing",
        "check that centring is on and the teacher's outputs are centred before its softmax; check views and learning rate",
        "dino.md 4, row 3: one-point collapse; DINO (arXiv:2104.14294), 5.3: sharpening without centring; bounds are our choice",
        lasting=PASSING,
        early=3,
    ),
    Rule(
        "uniform token targets",
        "alarm",
        {"patch_entropy": (0.98, INF), "patch_information": (-INF, 0.005)},
        "teacher outputs at hidden tokens are uniform: entropy {patch_entropy:.3f} ln K, so iBOT learns nothing",
        "check the teacher's temperature and patch_centring; try sinkhorn",
        "dino.md 4, row 2; bounds are our choice",
        lasting=PASSING,
        early=3,
    ),
    Rule(
        "constant token targets",
        "alarm",
        {"patch_entropy": (-INF, 0.98), "patch_information": (-INF, 0.005)},
        "the teacher answers the same at every hidden token (entropy {patch_entropy:.3f} ln K)",
        "check that patch_centring is on; check mask ratio and learning rate",
        "dino.md 4, row 3, which we apply to tokens; bounds are our choice",
        lasting=PASSING,
        early=3,
    ),
    *(
        Rule(
            f"collapsed {head}",
            "alarm",
            {f"{head}_collapse": (0.6, INF)},
            f"outputs of the {head} are nearly the same for all crops: collapse coefficient {{{head}_collapse:.2f}}",
            "check predictor and stop-gradient (SimSiam needs both), the overlap of views, the learning rate",
            "methods.md 1, collapse coefficient; SimSiam (arXiv:2011.10566), 4.1 and 4.2, on both remedies; .6 is our choice",
            early=1,
        )
        for head in ("projector", "predictor")
    ),
    Rule(
        "projector on a few lines",
        "alarm",
        {"projector_rank": (0.0, 3.0)},
        "outputs of the projector vary along few directions: effective rank {projector_rank:.2f}. Its batch norm keeps each "
        "channel alive, so the collapse coefficient cannot see it",
        "check predictor and stop-gradient (SimSiam needs both), the overlap of views, the learning rate",
        "RankMe (arXiv:2210.02885) on projections; 3 is our choice",
    ),
    Rule(
        "features on one line",
        "alarm",
        {"effective_rank": (0.0, 1.5)},
        "pooled features vary along one direction only: effective rank {effective_rank:.2f}",
        "a dimensional collapse: check learning rate and views; look at the pictures of features",
        "RankMe (arXiv:2210.02885); 1.5 is our choice",
    ),
    Rule(
        "spatial collapse",
        "warning",
        {"token_variance_share": (0.0, 0.05), "token_similarity": (0.95, 1.01)},
        "places of one crop look alike (similarity {token_similarity:.3f}) while crops differ: places hold "
        "{token_variance_share:.1%} of the variance",
        "flips in 3D, no absolute positions, stronger intensity augmentation (methods.md 9); or a dense loss",
        "dino.md 4 and methods.md 9; bounds are our choice",
    ),
)

TRENDS = (
    *(
        Rule(
            f"{term} dominates",
            "warning",
            {f"grad_share_{term}": (0.9, INF)},
            f"{label} dominates: gradient share {{grad_share_{term}:.2f}} on the shared encoder",
            "if other terms are flat, look for their collapse first; weights alone changed nothing in one report",
            "dino.md 4: log gradient norms instead of guessing; .9 is our choice",
            lasting=5,
        )
        for term, label in (("dino", "DINO"), ("ibot", "iBOT"), ("koleo", "KoLeo"), ("dense", "the dense term"))
    ),
    Rule(
        "terms pull apart",
        "warning",
        {"lowest_cosine": (-INF, -0.5)},
        "two loss terms pull the encoder in opposite directions: cosine of their gradients {lowest_cosine:.2f}",
        "look at grad_cosine_* in the log and lower the weight of one of them",
        "our choice",
        lasting=5,
    ),
    Rule(
        "DINO flat, iBOT moves",
        "warning",
        {"dino_range": (0.0, 0.005), "ibot_range": (0.03, INF), "dino_of_ln_k": (0.9, INF)},
        "DINO flattened at {dino_of_ln_k:.3f} ln K (range {dino_range:.2%} over 10 epochs) while iBOT still moves "
        "({ibot_range:.1%})",
        "slower teacher-temperature warm-up, an EMA that ends below 1, another learning rate, higher mask ratio",
        "dino.md 4: causes that one project's notes name for flat DINO with fluctuating iBOT; bounds are our choice",
        lasting=1,
    ),
    Rule(
        "iBOT rises",
        "warning",
        {
            "ibot_of_lowest": (1.1, INF),
            # Cross-entropy is the teacher's entropy plus what the student gets wrong: the first may grow.
            "patch_entropy_of_lowest": (0.0, 1.1),
            "teacher_temperature_range": (0.0, 1e-6),
        },
        "iBOT is {ibot_of_lowest:.2f} times its lowest value and stays there, and not because its targets grew richer "
        "(teacher entropy {patch_entropy_of_lowest:.2f} times its lowest)",
        "the student falls behind: check momentum and learning rate",
        "dino.md 4: iBOT rising late was seen; both 1.1 and the remedy are our choice",
        lasting=5,
    ),
    Rule(
        "rank falls",
        "warning",
        {"rank_of_highest": (0.0, 0.33), "effective_rank": (0.0, 8.0)},
        "the effective rank of pooled features fell to {effective_rank:.1f}, {rank_of_highest:.0%} of its highest",
        "a collapse may be under way: check teacher entropy, collapse coefficients and the learning rate",
        "RankMe (arXiv:2210.02885); bounds are our choice",
    ),
    Rule(
        "probe falls",
        "warning",
        {"probe_loss": (0.05, INF)},
        "the linear probe of frozen features fell to {probe_dice:.3f} Dice, {probe_loss:.3f} below its best, whatever the loss",
        "trust the probe: keep an earlier checkpoint, lower the learning rate",
        "dino.md 4: no proxy; trust the probe; .05 is our choice",
        lasting=2,
    ),
    Rule(
        "probe below random",
        "warning",
        {"probe_gain": (-INF, -0.03)},
        "frozen features probe at {probe_dice:.3f} Dice, below the same network with random weights "
        "({probe_dice_random:.3f})",
        "the method unlearns what the labels ask for: check views, crop size and learning rate",
        "dino.md 7: random-initialisation line; .03 is our choice",
        lasting=3,
    ),
)

RULES = (*CAUSES, *COLLAPSES, *TRENDS)
