"""One run of the model as a method sees it: the activation, the scores asked for, and the way back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from onnx_ir import Value

from onnxcam import layers
from onnxcam.backward import gradient
from onnxcam.biases import biases
from onnxcam.emit import Emitter
from onnxcam.grid import PLANES, Grid
from onnxcam.loops import each
from onnxcam.replay import replay
from onnxcam.seed import Seeds, gradients_of_sums
from onnxcam.vjp import RULES, VARIANTS, Rule
from onnxcam.vjp.shapes import dims, rank


@dataclasses.dataclass(frozen=True)
class Probe:
    """A run of the model on a batch of pictures, seen from one layer.

    Attributes:
        op: where the nodes go.
        picture: the model's input, [N,C,H,W] or [N,H,W,C].
        layout: how the picture lies in it.
        layer: the activation as the model computes it.
        grid: how the plane lies in the layer.
        scores: what is explained, [N,...].
        seeds: the K sums of the scores asked for.
        rules: the gradient rules of the operators.
    """

    op: Emitter
    picture: Value
    layout: Grid
    layer: Value
    grid: Grid
    scores: Value
    seeds: Seeds
    rules: Mapping[tuple[str, str], Rule] = dataclasses.field(default_factory=lambda: RULES)

    def activation(self) -> Value:
        """The activation as planes, A [N,C,h,w]."""
        return self.grid.planes(self.op, self.layer)

    def y(self) -> Value:
        """The K sums of scores, [N,K]."""
        return self.seeds.sums(self.op, self.scores)

    def size(self) -> list[int] | Value:
        """Height and width of the picture."""
        return self._sizes(range(2, 4))

    def sizes(self) -> list[int] | Value:
        """Channels, height and width of the picture."""
        return self._sizes(range(1, 4))

    def _sizes(self, axes: range) -> list[int] | Value:
        """The sizes of the picture along some axes of [N,C,H,W]."""
        order = range(4) if self.layout.order == PLANES else (0, 3, 1, 2)
        sizes = [dims(self.picture)[order[axis]] for axis in axes]
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
        return self.op.Shape(self.layout.planes(self.op, self.picture), start=axes.start, end=axes.stop)

    def per_sum(self, function: Callable[[Value], Sequence[Value]]) -> list[Value]:
        """Return what `function` makes of the gradient of the K sums, dy/dA [N,k,C,h,w], for all K.

        Args:
            function: it may be called for one of them at a time (k = 1) or for all; it returns values
                [N,k,...].

        Raises:
            OnnxcamError: the layer does not influence the scores, or an operator has no rule.
        """

        def on_planes(da: Value) -> Sequence[Value]:
            return function(self.grid.planes(self.op, da))

        return self.per_sum_at([self.layer], on_planes)

    def per_sum_at(self, values: Sequence[Value], function: Callable[..., Sequence[Value]]) -> list[Value]:
        """Do the same with the gradients [N,k,...] of several values [N,...] of the model, in one walk."""
        return gradients_of_sums(self.op, self.scores, self.seeds, values, function, self.rules)

    def biases(self) -> list[tuple[Value, Value, Grid | None]]:
        """What the model adds after the picture: a value, its constant part with K axis, and its plane.

        The constant broadcasts against the value's gradient [N,k,...]. The plane is None where the value has
        no positions.
        """
        places = {layer.value: layer.grid for layer in layers.explainable(self.picture, self.scores)}
        return [
            (value, self.op.Unsqueeze(b, [1]) if rank(b) == rank(value) else b, places.get(value))
            for value, b in biases(self.op, self.scores, self.picture)
        ]

    def attention(self) -> list[Value]:
        """The weights [N,heads,queries,T] with which the layer's T tokens are attended to after it."""
        return layers.attention_maps(self.layer, self.scores)

    def early_exits(self) -> "list[tuple[Value, Probe]]":
        """For each `attention`: its weights, and the run where its block is the last before the head.

        There every token is the mean of those that the block makes.

        Raises:
            OnnxcamError: a block is not found.
        """
        op, attention = self.op, self.attention()
        tokens = layers.block_tokens(attention, self.scores)
        exits = []
        for weights, made in zip(attention, tokens, strict=True):
            mean = op.Expand(op.ReduceMean(made, [1], keepdims=1), op.Shape(made))
            mean.shape = made.shape
            (scores,) = replay(op, [self.scores], {tokens[-1]: mean})
            exits.append((weights, dataclasses.replace(self, scores=scores)))
        return exits

    def curvature(self, da: Value) -> Value | None:
        """Return H A [N,1,C,h,w], H the second derivative of the one sum that `da` [N,1,C,h,w] belongs to.

        Returns:
            None where the gradient does not depend on the activation.
        """
        op = self.op
        found = gradient(op, da, op.Unsqueeze(self.activation(), [1]), self.layer, self.rules)
        return None if found is None else op.Unsqueeze(self.grid.planes(op, found), [1])

    def on(self, picture: Value) -> "Probe":
        """The run of the whole model on other pictures, of the same shape."""
        picture.shape = self.picture.shape
        layer, scores = replay(self.op, [self.layer, self.scores], {self.picture: picture})
        return dataclasses.replace(self, picture=picture, layer=layer, scores=scores)

    def with_activation(self, planes: Value) -> "Probe":
        """The run of the rest of the model on another activation [N,C,h,w]."""
        layer = self.grid.restore(self.op, planes, self.layer)
        layer.shape = self.layer.shape
        (scores,) = replay(self.op, [self.scores], {self.layer: layer})
        return dataclasses.replace(self, layer=layer, scores=scores)

    def each(self, items: Value, function: Callable[[Value], Value]) -> Value:
        """Return ``function(item)`` for the entries of `items` along axis 0, stacked along a new axis 0."""
        return each(self.op, [items], lambda item: [function(item)])[0]

    def over_picture(self, planes: Value) -> Value:
        """Lay [N,c,H,W] out as the picture is, so that it broadcasts against it."""
        return planes if self.layout.order == PLANES else self.op.Transpose(planes, perm=[0, 2, 3, 1])

    def at_picture(self) -> "Probe":
        """The same run seen from the picture itself."""
        return dataclasses.replace(self, layer=self.picture, grid=self.layout)

    def under(self, variant: str) -> "Probe":
        """The same run with the gradient rules of a variant."""
        return dataclasses.replace(self, rules={**self.rules, **VARIANTS[variant]})
