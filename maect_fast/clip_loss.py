"""open_clip's `ClipLoss` on `symmetric_info_nce`: the same signature, no matrix of logits.

Source: mlfoundations/open_clip: src/open_clip/loss.py (ClipLoss, gather_features).
"""

import torch.distributed as dist
from torch import Tensor, nn

from maect_fast.kernels import symmetric_info_nce
from maect_fast.kernels._common.checks import check_bool, check_int, check_tensors

__all__ = ["ClipLoss"]


class ClipLoss(nn.Module):
    """CLIP's loss of unit image and text features, in open_clip's place.

    Features are normalised inside, which changes nothing of unit ones, as open_clip's models return
    them. Their gradient has no part along the feature itself, which the model's own normalisation
    drops in open_clip: parameters get the same. The backward pass sends nothing.

    Args:
        local_loss: the loss is the mean over this rank's rows instead of all; gradients averaged
            over ranks are the same.
        gather_with_grad: gradients of other ranks' losses reach this rank's features. Without, they
            are 1 / world_size of it, as in open_clip, whose default it is.
        cache_labels: of no meaning, as there are no labels to keep.
        rank: of this process.
        world_size: number of processes in the default group.
        use_horovod: False.

    Raises:
        ValueError: horovod, or `local_loss` without `gather_with_grad`, which in open_clip loses
            the gradients of features as other ranks' negatives.

    Source: mlfoundations/open_clip: src/open_clip/loss.py; arXiv 2103.00020 figure 3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        for name, flag in (flags | {"cache_labels": cache_labels}).items():
            check_bool(name, flag)
        check_int("world_size", world_size, 1)
        check_int("rank", rank, 0, world_size - 1)
        if use_horovod:
            raise ValueError("use_horovod: expected False, got True: ranks meet in torch's group")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "local_loss: expected False without gather_with_grad, got True: "
                "gradients through other ranks' rows would be lost"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Mean over images and texts of ``-log softmax(logit_scale * <row, others>)[partner]``.

        Args:
            image_features: [n, D] unit rows, any float dtype; gets a gradient.
            text_features: [n, D], the same dtype; gets a gradient.
            logit_scale: above 0, a float or a tensor of one number; gets a gradient.
            logit_bias: one number. It is in every logit and leaves the softmax as it is: its
                gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.

        Returns:
            0-d, at least fp32.

        Raises:
            ValueError: shapes or dtypes that do not fit, ranks that are not those of the group.
        """
        check_tensors(image_features=image_features, text_features=text_features)
        shapes = [list(image_features.shape), list(text_features.shape)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] == 0:
            got = f"{shapes[0]} and {shapes[1]}"
            raise ValueError(f"image_features, text_features: expected both [n, D], got {got}")
        dtypes = (image_features.dtype, text_features.dtype)
        if dtypes[0] != dtypes[1] or not dtypes[0].is_floating_point:
            got = f"{dtypes[0]} and {dtypes[1]}"
            raise ValueError(
                f"image_features, text_features: expected floats of a dtype, got {got}"
            )
        if isinstance(logit_scale, Tensor):
            if logit_scale.numel() != 1:
                raise ValueError(f"logit_scale: expected one number, got {list(logit_scale.shape)}")
            temperature: Tensor | float = 1 / logit_scale.reshape(())
        elif logit_scale > 0:
            temperature = 1 / logit_scale
        else:
            raise ValueError(f"logit_scale: expected a number above 0, got {logit_scale}")
        features = [image_features, text_features]
        group = self._group()
        if group is not None and not self.gather_with_grad:
            share = 1 / self.world_size
            features = [share * x + (1 - share) * x.detach() for x in features]
        loss = symmetric_info_nce(*features, temperature=temperature, group=group)
        if group is not None and not self.local_loss:
            # The ranks' mean, with the gradient of the own part.
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=group)
            loss = loss + (mean / self.world_size - loss.detach())
        if logit_bias is not None:
            # A parameter without any gradient would be an error to DistributedDataParallel.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        found = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else None
        if found != (self.rank, self.world_size):
            expected = f"the process group's {found}" if found else "an initialised process group"
            got = (self.rank, self.world_size)
            raise ValueError(f"rank, world_size: expected {expected}, got {got}")
        return dist.group.WORLD
