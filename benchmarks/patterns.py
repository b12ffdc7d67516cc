"""Zero patterns: keep masks of a given density, and magnitude pruning of whole models."""

import torch


def keep_mask(weight: torch.Tensor, pattern: str, zeros: float) -> torch.Tensor:
    """Boolean mask of the entries of `weight` [out_features, in_features] that stay.

    Args:
        weight: decides by magnitude; for blocks by the block's sum of magnitudes.
        pattern: "unstructured", "2:4" (any N:M, along in_features) or a block such as "16x16".
        zeros: fraction of zeros; N:M has its own.
    """
    magnitude = weight.detach().abs().float()
    if pattern == "unstructured":
        return _largest(magnitude, zeros)
    if ":" in pattern:
        kept, group = (int(part) for part in pattern.split(":"))
        padded = torch.nn.functional.pad(magnitude, (0, -magnitude.shape[1] % group), value=-1.0)
        groups = padded.unflatten(1, (-1, group))
        order = groups.argsort(dim=-1, descending=True).argsort(dim=-1)
        return (order < kept).flatten(1)[:, : magnitude.shape[1]]
    height, width = (int(part) for part in pattern.split("x"))
    rows, columns = magnitude.shape
    padded = torch.nn.functional.pad(magnitude, (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3))
    kept_blocks = _largest(blocks, zeros)
    full = kept_blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return full[:rows, :columns]


def _largest(score: torch.Tensor, zeros: float) -> torch.Tensor:
    keep = torch.ones_like(score, dtype=torch.bool).flatten()
    count = round(zeros * score.numel())
    keep[score.flatten().argsort()[:count]] = False
    return keep.view_as(score)


def prune_model(model: torch.nn.Module, pattern: str, zeros: float, skip: str = "lm_head") -> float:
    """Zeroes the weights of all linear layers except `skip` by magnitude, in place.

    Returns:
        The fraction of zeros among the weights that were pruned.
    """
    zeroed = total = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(skip):
                module.weight.mul_(keep_mask(module.weight, pattern, zeros))
                zeroed += int((module.weight == 0).sum())
                total += module.weight.numel()
    return zeroed / max(total, 1)
