"""A network as the shapes of its layers, written down one after the other; no framework, no weights."""

from __future__ import annotations

import math

from edgecomp.work import Kind, Work, conv_work, linear_work, other_work

Shape = tuple[int, int, int]


class Net:
    """A network in the making: `shape` (C, H, W) is what the last operator wrote, `layers` what there is so far."""

    def __init__(self, channels: int, height: int, width: int | None = None) -> None:
        self.shape: Shape = (channels, height, height if width is None else width)
        self.layers: list[Work] = []

    def _name(self, what: str) -> str:
        return f"{len(self.layers)}.{what}"

    def conv(
        self, out: int, k: int | tuple[int, int] = 1, s: int = 1, *, groups: int = 1, at: Shape | None = None,
        pad: int | None = None,
    ) -> Shape:  # fmt: skip
        """Add a convolution; of what stands `at`, or of what was written last.

        Padding keeps H and W over stride, unless it is `pad` on every side.
        """
        found = self.shape if at is None else at
        kernel = (k, k) if isinstance(k, int) else k
        sizes = zip(found[1:], kernel, strict=True)
        h, w = (-(-n // s) if pad is None else (n + 2 * pad - kk) // s + 1 for n, kk in sizes)
        self.shape = (out, h, w)
        self.layers.append(
            conv_work(
                self._name("conv"), in_shape=found, out_shape=self.shape, kernel=kernel, stride=(s, s), groups=groups
            )
        )
        return self.shape

    def dw(self, k: int = 3, s: int = 1, *, at: Shape | None = None) -> Shape:
        """Add a depthwise convolution."""
        found = self.shape if at is None else at
        return self.conv(found[0], k, s, groups=found[0], at=found)

    def fc(self, out: int) -> None:
        """Add a fully connected layer of all that there is."""
        self.layers.append(linear_work(self._name("fc"), math.prod(self.shape), out))
        self.shape = (out, 1, 1)

    def other(self, shape: Shape | None = None, *, reads: int = 1, inputs: int | None = None) -> Shape:
        """Add an operator without weights that reads `reads` times what it was given."""
        found = self.shape
        self.shape = found if shape is None else shape
        read = reads * math.prod(found) if inputs is None else inputs
        self.layers.append(other_work(self._name("other"), read, math.prod(self.shape)))
        return self.shape

    def add(self) -> None:
        """Add a sum of two of the same shape."""
        self.other(reads=2)

    def product(self, shape: Shape, summands: int, inputs: int) -> None:
        """Add a matrix product of two activations: a 1x1 convolution whose weight is no constant."""
        self.shape, outputs = shape, math.prod(shape)
        self.layers.append(
            Work(
                name=self._name("product"), kind=Kind.POINTWISE, macs=outputs * summands, weights=0, inputs=inputs,
                outputs=outputs, summands=summands, out_channels=shape[0],
            )
        )  # fmt: skip

    def concat(self, channels: int) -> None:
        """Join with others to so many channels."""
        shape = (channels, *self.shape[1:])
        self.other(shape, inputs=math.prod(shape))

    def pool(self, s: int = 2, k: int | None = None, *, valid: bool = False) -> None:
        """Add a pooling window."""
        kk = s if k is None else k
        h, w = ((n - kk) // s + 1 if valid else -(-n // s) for n in self.shape[1:])
        self.other((self.shape[0], h, w))

    def gap(self) -> None:
        """Add global average pooling."""
        self.other((self.shape[0], 1, 1))

    def excite(self, squeezed: int, *, swish: bool = False) -> None:
        """Add squeeze and excitation; between its layers a ReLU, or an operator of its own."""
        shape = self.shape
        self.gap()
        self.fc(squeezed)
        if swish:
            self.other()
        self.fc(shape[0])
        self.other()
        self.shape = shape
        self.other(inputs=math.prod(shape) + shape[0])
