"""``nnssl_plan``: what a planner would plan, in words and as a picture of one batch, before anything is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nnssl_ext.catalogue import load_method, pretraining_methods
from nnssl_ext.cli._run import run
from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.files import read_json
from nnssl_ext.nnunet_plugin.registry import registry
from nnssl_ext.paths import dataset_id, dataset_name

if TYPE_CHECKING:
    from nnssl_ext.contracts import Method
    from nnssl_ext.planners.base import PretrainingPlanner
    from nnssl_ext.planners.memory import Views
    from nnssl_ext.records import Case

PLANNERS = "nnunetv2.experiment_planning"
CONFIGURATION = "3d_fullres"
MOST_PICTURES = 4
DRAWS = 16
"""How often a method draws from a case to learn how many tokens it hides."""


def parser() -> argparse.ArgumentParser:
    """nnU-Net's planning flags, and ours."""
    p = argparse.ArgumentParser(
        prog="nnssl_plan",
        description="Preview a planner's decisions: sizes in voxels and mm, parameters, memory, hours, and why. Writes "
        "no plans unless asked to (the label-free fingerprint is kept in the preprocessed folder).",
    )
    p.add_argument("dataset", help="dataset id or name")
    p.add_argument("-pl", required=True, help=f"planner: {', '.join(sorted(_planners()))}")
    p.add_argument(
        "-tr",
        default="MAETrainer",
        help=f"method whose views and teacher must fit into memory: {', '.join(pretraining_methods())} (default: MAETrainer, "
        "which nnUNetv2_plan_experiment plans for too)",
    )
    p.add_argument("-gpu_memory_target", type=float, help="GB (default: the planner's)")
    p.add_argument("-overwrite_target_spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="mm")
    p.add_argument("-overwrite_plans_name", help="name of the plans (default: the planner's)")
    p.add_argument("--token_size", type=int, nargs=3, metavar=("Z", "Y", "X"), help="voxels per token (Primus)")
    p.add_argument("--patch_size", type=int, nargs=3, metavar=("Z", "Y", "X"), help="voxels; also the global crop")
    p.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="HU that CT is clipped to (default: percentiles)"
    )
    p.add_argument("--batch_size", type=int, help="cases per step, in pretraining and in nnU-Net")
    p.add_argument("--png", type=Path, help="picture of one batch (default: <plans>_crops.png in the current folder)")
    p.add_argument("--write", action="store_true", help="save the plans, as nnUNetv2_plan_experiment does")
    return p


def main() -> None:
    """Entry point of ``nnssl_plan``."""
    run(_main)


def _main() -> int:
    args = parser().parse_args()
    planner = _planner(args)
    from nnssl_ext.planners.preview import describe

    classes = len(planner.dataset_json["labels"])
    planner.views = _views(planner.make_plans(), args.tr)
    before = planner.preprocessed / f"{planner.plans_identifier}.json"
    saved = read_json(before) if before.is_file() else None
    if args.write:
        plans = planner.plan_experiment()
    else:
        plans = planner.make_plans()
        print(describe(plans, CONFIGURATION, classes))
    print(_hours(plans, classes, planner.views, args.tr))
    try:
        cases = _cases(plans, saved, _preprocess(args, plans["plans_name"]))
        png = _draw(plans, cases, args.tr, args.png or Path(f"{plans['plans_name']}_crops.png"))
        print(f"  crops of one batch, masks outlined: {png}")
    except NnsslError as error:
        print(f"  no picture of crops: {error.what}\n    -> {error.fix}")
    return 0


def _planners() -> dict[str, str]:
    return {name: where for (module, name), where in registry().items() if module == PLANNERS}


def _planner(args: argparse.Namespace) -> PretrainingPlanner:
    import importlib

    planners = _planners()
    if args.pl not in planners:
        raise unknown_name("planner", args.pl, planners)
    dataset = dataset_name(args.dataset, "nnUNet_raw")
    module, name = planners[args.pl].split(":")
    cls = getattr(importlib.import_module(module), name)

    from nnssl_ext.checkpoints.adapt import check_name
    from nnssl_ext.planners.overrides import Overrides

    if args.overwrite_plans_name is not None:
        check_name(args.overwrite_plans_name, "-overwrite_plans_name")
    overrides = Overrides(_size(args.token_size), _size(args.patch_size), args.batch_size, _window(args.window))
    planner: PretrainingPlanner = cls(
        dataset,
        args.gpu_memory_target,
        plans_name=args.overwrite_plans_name,
        overwrite_target_spacing=args.overwrite_target_spacing,
    )
    planner.overrides = overrides
    return planner


def _size(values: list[int] | None) -> tuple[int, int, int] | None:
    return (values[0], values[1], values[2]) if values else None


def _window(values: list[float] | None) -> tuple[float, float] | None:
    return (values[0], values[1]) if values else None


def _method(plans: dict[str, Any], name: str) -> Method:
    """The method with its defaults for these plans."""
    from nnssl_ext.networks.build import build_backbone
    from nnssl_ext.plans import pretrain_plan

    channels = len(plans["configurations"][CONFIGURATION]["normalization_schemes"])
    plan = pretrain_plan(plans, CONFIGURATION, channels)
    trainer = load_method(name)
    settings = trainer.settings_type.for_plan(plan)
    return trainer(settings, build_backbone(plans, CONFIGURATION, channels), plan)


def _views(plans: dict[str, Any], name: str) -> Views:
    """What the method holds in memory of each case, found out by drawing from a blank one (some methods look at the case);
    views up to the size of the plans' local crop count as such, larger ones as global crops. Hidden tokens: mean of the draws."""
    import math
    import tempfile

    import blosc2
    import numpy as np
    from torch import nn

    from nnssl_ext.planners.memory import Views
    from nnssl_ext.records import Case

    method = _method(plans, name)
    crops = plans["configurations"][CONFIGURATION]["nnssl"]
    z, y, x = (2 * edge for edge in crops["global_crop"])
    with tempfile.TemporaryDirectory() as folder:
        case = Case("blank", Path(folder), 1, (z, y, x), (1.0, 1.0, 1.0))
        blosc2.zeros((1, z, y, x), dtype=np.float32, urlpath=str(case.folder / "blank.b2nd"))
        rng = np.random.default_rng(0)
        draws = [method.view_policy.draw(case, rng, (number + 0.5) / DRAWS) for number in range(DRAWS)]
    views = draws[0]
    local = sum(math.prod(view.size) <= math.prod(crops["local_crop"]) for view in views)
    hidden = sum(int(view.mask.sum()) for draw in draws for view in draw if view.mask is not None) / DRAWS
    network = list(method.export_backbone().network.parameters())
    trained = any(weight.requires_grad for weight in network)
    trained_weights = sum(weight.numel() for weight in cast(nn.Module, method).parameters() if weight.requires_grad)
    prototypes = getattr(getattr(method.settings, "head", None), "prototypes", 0)
    return Views(
        len(views) - local,
        local,
        teacher=not trained,
        heads=max(0, trained_weights - sum(weight.numel() for weight in network)),
        logits=round((hidden + len(views)) * prototypes),
    )


def _hours(plans: dict[str, Any], classes: int, views: Views, method: str) -> str:
    """Training time on this machine, from the network's arithmetic and a short measurement."""
    from nnssl_ext.planners.preview import cost_of
    from nnssl_ext.planners.speed import device_speed
    from nnssl_ext.plans import pretrain_plan

    channels = len(plans["configurations"][CONFIGURATION]["normalization_schemes"])
    plan = pretrain_plan(plans, CONFIGURATION, channels)
    settings = load_method(method).settings_type.for_plan(plan)
    steps = settings.epochs * settings.iterations
    device, speed = device_speed()
    macs = views.global_views * cost_of(plans, CONFIGURATION, classes).macs
    macs += views.local_views * cost_of(plans, CONFIGURATION, classes, "local_crop").macs
    seconds = steps * plan.batch_size * 6 * macs / speed  # two FLOP per MAC; backward costs twice the forward pass
    return (
        f"  {'hours':<12} {_rounded(seconds / 3600)} h for {method}'s {settings.epochs} epochs of {settings.iterations} steps on "
        f"this machine ({device}, {speed / 1e9:.3g} GFLOP/s)\n  {'':<12}   an estimate for one device with all voxels "
        f"encoded; masked autoencoders that skip hidden tokens take less"
    )


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1g}"


def _cases(plans: dict[str, Any], saved: dict[str, Any] | None, fix: str) -> list[Case]:
    """The preprocessed cases of these plans.

    Args:
        saved: the plans that lay in the preprocessed folder before this command: the data there are of those.
        fix: what leads to cases of these plans.

    Raises:
        NnsslError: nothing preprocessed for these plans yet, or differently.
    """
    from nnssl_ext.data.cases import list_cases
    from nnssl_ext.engine.job import data_folder

    folder = data_folder(plans["dataset_name"], plans, CONFIGURATION)
    z, y, x = plans["configurations"][CONFIGURATION]["spacing"]
    try:
        cases = list_cases(folder, (z, y, x))
    except NnsslError as error:
        raise NnsslError(error.what, fix) from error
    if saved is None or _preprocessing(saved) != _preprocessing(plans):
        raise NnsslError(f"data in {folder} are of the old plans, with another spacing or normalisation", fix)
    return cases


def _preprocessing(plans: dict[str, Any]) -> list[Any]:
    """What preprocessed arrays depend on. Only CTNormalization reads intensities."""
    from nnssl_ext.plans import configuration_of

    found = configuration_of(plans, CONFIGURATION)
    schemes, intensities = found["normalization_schemes"], plans["foreground_intensity_properties_per_channel"]
    windows = [intensities[str(i)] for i, scheme in enumerate(schemes) if scheme == "CTNormalization"]
    return [plans["transpose_forward"], found["spacing"], schemes, found["use_mask_for_norm"], windows]


def _draw(plans: dict[str, Any], cases: list[Case], method: str, png: Path) -> Path:
    """One batch of the method's views, cut from these cases.

    Raises:
        NnsslError: a case cannot be read, or the picture not be written.
    """
    import torch

    from nnssl_ext.data.loader import make_loader
    from nnssl_ext.objectives.reconstruction import upsample_mask
    from nnssl_ext.plans import pretrain_plan
    from nnssl_ext.reports.pictures import draw_planes
    from nnssl_ext.views.cut import cut_views

    plan = pretrain_plan(plans, CONFIGURATION, cases[0].channels)
    policy = _method(plans, method).view_policy
    count = min(MOST_PICTURES, plan.batch_size)
    (batch,) = make_loader(cases, policy, seed=0, start_step=0, steps=1, batch_size=count)
    volumes, masks = {}, {}
    for number, view in enumerate(cut_views(batch, torch.device("cpu"))):
        shown = None if view.mask is None else upsample_mask(view.mask, view.size)[:, 0].int().numpy()
        for sample, case in enumerate(view.cases):
            name = f"{case}, view {number + 1}"
            volumes[name] = view.voxels[sample].numpy()
            if shown is not None:
                masks[name] = shown[sample]
    draw_planes(volumes, png, plan.spacing, masks)
    return png


def _preprocess(args: argparse.Namespace, plans_name: str) -> str:
    """What leads to preprocessed cases of these plans: the stock planning command knows few of our flags."""
    number = dataset_id(args.dataset)
    plain = parser().parse_args([args.dataset, "-pl", args.pl])
    kept = {"png": args.png, "write": args.write}
    if not args.write and vars(args) == vars(plain) | kept:
        return f"run: nnUNetv2_plan_and_preprocess -d {number} -pl {args.pl} -c {CONFIGURATION}"
    first = "" if args.write else "repeat this command with --write, then "
    return f"{first}run: nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c {CONFIGURATION}"
