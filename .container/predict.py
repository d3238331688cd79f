#!/usr/bin/env python3
"""Segment the lesions in scans with a model that `train` made, and list them; with truth, measure detection."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="predict", description=__doc__)
    p.add_argument("scans", type=Path, help="folder of *.nii.gz")
    p.add_argument("out", type=Path, help="gets a label map per scan, and lesions.json")
    p.add_argument("--model", type=Path, required=True, metavar="RUN", help="output folder of train")
    p.add_argument("--arm", default="mae", help="(%(default)s)")
    p.add_argument("--labels", type=int, default=100, help="percent it was trained with (%(default)s)")
    p.add_argument("--label", type=int, default=1, help="value of lesions (%(default)s)")
    p.add_argument("--truth", type=Path, metavar="DIR", help="folder of label maps named as the scans")
    p.add_argument("--fast", action="store_true", help="no mirroring at test time")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="(%(default)s)")
    return p


def main() -> None:
    args = parser().parse_args()
    models = list((args.model / "models" / f"{args.arm}_{args.labels}").glob("Dataset*/nnsslFinetuneTrainer__*"))
    if len(models) != 1:
        held = sorted(path.name for path in (args.model / "models").glob("*_*"))
        sys.exit(f"{args.model} has no model {args.arm}_{args.labels}; it has {', '.join(held) or 'none'}")
    scans = sorted(args.scans.glob("*.nii.gz"))
    if not scans:
        sys.exit(f"no *.nii.gz in {args.scans}")
    with tempfile.TemporaryDirectory() as named:  # nnU-Net wants the channel in the name
        for scan in scans:
            case = scan.name.removesuffix(".nii.gz").removesuffix("_0000")
            (Path(named) / f"{case}_0000.nii.gz").symlink_to(scan.absolute())
        command = ["nnUNetv2_predict_from_modelfolder", "-i", named, "-o", args.out, "-m", models[0], "-f", "0"]
        command += ["-device", args.device, "-npp", "1", "-nps", "1", *(["--disable_tta"] if args.fast else [])]
        run(command)
    truth = [args.truth] if args.truth else []
    run(["nnssl_lesions", args.out, *truth, "-l", args.label, "-o", args.out / "lesions.json"])


def run(command: list[object]) -> None:
    print(" ".join(map(str, command)), flush=True)
    if subprocess.run(list(map(str, command)), check=False).returncode:
        sys.exit(f"{command[0]} failed")


if __name__ == "__main__":
    main()
