"""What users fix by hand is refused before anything is planned from it."""

import pytest

from nnssl_ext.errors import NnsslError
from nnssl_ext.planners.overrides import Overrides
from nnssl_ext.planners.primus import nnsslPlannerPrimusTiny


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"gpu_memory_target_in_gb": 0.0}, "-gpu_memory_target 0"),
        ({"gpu_memory_target_in_gb": float("nan")}, "-gpu_memory_target nan"),
        ({"plans_name": "../mine"}, "-overwrite_plans_name '../mine'"),
        ({"plans_name": "my plans"}, "-overwrite_plans_name 'my plans'"),
        ({"overwrite_target_spacing": [1.0, 0.0, 1.0]}, "-overwrite_target_spacing 1 0 1"),
        ({"overwrite_target_spacing": [1.0, 1.0, float("inf")]}, "-overwrite_target_spacing 1 1 inf"),
    ],
)
def test_options_that_nothing_can_be_planned_from_are_named(options, flag):
    with pytest.raises(NnsslError, match=f"^{flag}"):
        nnsslPlannerPrimusTiny(9, **options)


@pytest.mark.parametrize(
    ("fixed", "flag"), [({"patch_size": (16, 0, 16)}, "--patch_size 16 0 16"), ({"batch_size": 0}, "--batch_size 0")]
)
def test_sizes_below_one_are_named(fixed, flag):
    with pytest.raises(NnsslError, match=f"^{flag}"):
        Overrides(**fixed)
