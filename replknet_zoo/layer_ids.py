"""Layer ids for layer-wise learning-rate decay: parameter names of both families to 0 (stem) ... head."""
from collections.abc import Sequence

# stem, 12 for the stages, head: the recipe's number, for other depths too, so that a decay means the same
LAYER_DECAY_GROUPS = 14


def layer_id(name: str, depths: Sequence[int] | None = None, groups: int = LAYER_DECAY_GROUPS) -> int:
    """The id of a parameter by its name, with or without the `module.` of DistributedDataParallel.

    Without `depths` the published ids, made for blocks 2 2 18 2 and 14 groups: stem 0; first stage 1; second
    2; third 3 ... 11, four blocks an id; fourth 12; norm and head 13. A transition has the id of the last
    block before it.
    With a model's own `depths` (RepLKBlock + ConvFFN pairs a stage) the third stage, whatever its depth, is
    spread over the ids that the others leave of `groups`, so that every parameter has one; for 2 2 18 2 and
    14 they are the same. A RepMLPNet's units count as such pairs.
    """
    part, *rest = name.removeprefix('module.').split('.')
    last = groups - 1
    if part in ('stem', 'conv_embedding'):
        return 0
    if part not in ('stages', 'transitions', 'embeds'):
        return last
    stage = int(rest[0])
    if stage < 2:
        return 1 + stage
    if stage == 3:
        return last - 1
    if part == 'stages' and rest[1].isdecimal():  # a unit of RepMLPNet, as two blocks
        block = 2 * int(rest[1])
    elif part == 'stages' and rest[1] == 'blocks':
        block = int(rest[2])
    else:  # it follows the stage's last block
        return last - 2
    if depths is None:
        return min(3 + block // 4, last - 2)
    return 3 + block // 2 * (last - 4) // depths[2]
