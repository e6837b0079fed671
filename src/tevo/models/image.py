"""ImageClassifier: patches of an image as tokens on a grid, through an encoder of any parts."""

from __future__ import annotations

from torch import Tensor, nn

from tevo.catalogue.create import Spec
from tevo.models.encoder import Encoder, Specs, pool


class ImageClassifier(nn.Module):
    """Classifies an image by the mean of the encoder's outputs.

    Args:
        image_size: (rows, columns) in pixels, multiples of ``patch``.
        patch: side of a square patch in pixels; one patch is one token, in row-major order.
        channels: colour channels of the image.
        classes: number of classes.
        dim, depth, heads, mixer, channel, position, residual, norm, hidden_dim, dropout, stack: as for
            :class:`~tevo.models.encoder.Encoder`.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch: int,
        classes: int,
        dim: int,
        depth: int,
        channels: int = 3,
        heads: int = 8,
        mixer: Specs = "softmax",
        channel: Specs | None = None,
        position: Spec | None = None,
        residual: Spec | None = None,
        norm: str | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        stack: Spec | None = None,
    ) -> None:
        super().__init__()
        rows, columns = image_size
        if rows % patch or columns % patch:
            raise ValueError(
                f"ImageClassifier cannot cut an image of {rows} x {columns} pixels into patches of {patch}; choose a patch "
                "that divides both"
            )
        self.image_size = image_size
        grid = (rows // patch, columns // patch)
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            heads=heads,
            mixer=mixer,
            channel=channel,
            position=position,
            residual=residual,
            norm=norm,
            length=grid[0] * grid[1],
            grid=grid,
            hidden_dim=hidden_dim,
            dropout=dropout,
            stack=stack,
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (b, channels, rows, columns) give logits (b, classes)."""
        if images.shape[-2:] != self.image_size or images.ndim != 4:
            raise ValueError(
                f"ImageClassifier was built for images of {self.image_size[0]} x {self.image_size[1]} pixels, got a tensor of "
                f"shape {tuple(images.shape)}; resize the images or rebuild with their size"
            )
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # b n d
        return self.head(pool(self.encoder(tokens), None))
