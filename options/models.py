"""`ModelConfig`: options that both programs share."""

import functools
from dataclasses import dataclass, fields
from typing import ClassVar

from options.custom_mixer import CustomMixer, check_unchanged, help_of, is_address, load, settle
from options.data import default_statistics
from options.fields import SIDE, WIDTH, as_words, check_value, option, specs
from options.layers import WITHOUT_EFFECT, Row, check_layer, layer_label, layer_row, layers_of
from options.neighbors import NeighborConfig

# Help texts of options that both programs declare.
MIXER_OPTION = "option of a custom mixer, repeatable; --layer FILE.py:Class --help lists them"
LAYER_SHA256 = "SHA-256 of the file of a custom mixer, which a run records"
SCORE_TEMPERATURE = "divisor of the scores before the softmax"
TOPK = (
    "top-k in training: hard; or learned, with a gradient for all candidates: the K nearest (straight_through) or K drawn by "
    "their scores (gumbel)"
)
GRAPH_AGGREGATION = "ViG: aggregation of the neighbors of a token"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(NeighborConfig):
    """Options of both models: neighbors, the layer, and three fields that follow from the data set.

    `rows` describes the layers; a config with a custom mixer adds a row under its address.
    """

    heading = "model and layer"
    rows: ClassVar[dict[str, Row]] = {}
    sizes: ClassVar[tuple[str, str]]  # positional arguments of a layer
    unscored: ClassVar[frozenset[str]]  # layers that search neighbors without weighting by their scores
    layer_form: ClassVar[str] = ""  # forms of `layer` besides a name, for the error message

    drop_path: float = option(
        0.0,
        "ViT: probability of skipping a block's mixer or MLP for an image, rising linearly over the blocks to this",
        low=0,
        below=1,
    )
    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    num_classes: int = 10

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if not specs(type(self))["layer"].choices:  # a subclass may have layers of another library
            check_layer(self.layer, self.rows, self.layer_form)
        size = self.image_size
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"image_size={size!r} is neither a side nor height and width")
        object.__setattr__(self, "image_size", tuple(check_value("image_size", side, int, 1, SIDE) for side in sides))
        for name in ("in_channels", "num_classes"):
            object.__setattr__(self, name, check_value(name, getattr(self, name), int, 1, WIDTH))
        self._take_custom_mixers()

    @classmethod
    def custom_mixers(cls, layer: str) -> list[CustomMixer]:
        """Import the classes that a layer names by address. Raises ValueError for one that cannot be a mixer."""
        options = specs(cls)
        names = {name for row in cls.rows.values() for name in row.arguments.values()} | specs(NeighborConfig).keys()
        sources = {name: f"--{name}" if name in options else "the model" for name in names}
        if "attention_bias" in options:
            sources["bias"] = "--attention_bias"
        return [load(name, cls.sizes, sources) for name in layers_of(layer) if is_address(name)]

    def _take_custom_mixers(self) -> None:
        """Import the classes that `layer` names by address, and store their rows, absolute addresses and hashes."""
        mixers = self.custom_mixers(self.layer)
        if not mixers:
            for name in ("mixer_option", "layer_sha256"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} {as_words(getattr(self, name))} needs a custom mixer, and {self.layer} is built in; "
                        "use layer=FILE.py:Class or drop it"
                    )
            return
        addresses = iter([mixer.address for mixer in mixers])
        layer = "/".join(next(addresses) if is_address(name) else name for name in layers_of(self.layer))
        sha256 = "/".join(mixer.sha256 for mixer in mixers)
        check_unchanged(layer, self.layer_sha256, sha256)
        values, settled = settle(mixers, self.mixer_option or ())
        rows = {
            mixer.address: Row(mixer.target, tuple(mixer.takes), fixed=tuple(fixed.items()))
            for mixer, fixed in zip(mixers, values, strict=True)
        }
        found = {"layer": layer, "layer_sha256": sha256, "mixer_option": settled or None, "rows": self.rows | rows}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def more_help(cls, given: dict) -> list[tuple[str, str, dict[str, str]]]:
        """Return the --help of the custom mixers that --layer names: title, text, and a line per option."""
        layers = given.get("layer") or []
        layers = [layers] if isinstance(layers, str) else layers
        return [help_of(mixer) for layer in layers for mixer in cls.custom_mixers(layer)]

    @property
    def neighbors(self) -> NeighborConfig:
        return NeighborConfig(**{f.name: getattr(self, f.name) for f in fields(NeighborConfig)})

    @property
    def title(self) -> str:
        """Name of the model in the first line of a run."""
        return layer_label(self.layer)

    def layers_in_use(self) -> list[str]:
        """Return the names of the layers in the model."""
        raise NotImplementedError

    def without_effect(self, *, defaults: bool = False) -> dict[str, str]:
        """Return the options that this model does not read, each with the option that causes it.

        An option that another one switches off is listed at its default value only with `defaults`.
        """
        in_use = self.layers_in_use()
        if not self.rows.keys() >= set(in_use):
            return {}  # a layer of another library, whose options are unknown
        options = specs(type(self))
        rows = {layer: layer_row(self.rows, layer, self.branch_ratio) for layer in in_use}
        read = {name for row in rows.values() for name in row.options}
        if any(self.rows[layer].branches for layer in in_use):
            read.add("branch_ratio")
        of_layers = {name for row in self.rows.values() for name in row.options}
        found = {name: "layer" for name in options if name in of_layers - read}
        if self.mixer_option and not any(map(is_address, in_use)):
            found["mixer_option"] = "layer"
        for name, other, values in WITHOUT_EFFECT:
            if name not in options or name in found or other not in options or other in found:
                continue
            if getattr(self, other) in values and (defaults or getattr(self, name) != options[name].default):
                found[name] = other
        searching = {layer for layer, row in rows.items() if "magnitude_type" in row.options}
        if self.similarity_type == "Loc" and searching <= self.unscored:  # they rank by distance then
            found.setdefault("magnitude_type", "similarity_type")
        with_heads = {layer for layer, row in rows.items() if "num_heads" in self.sizes or "num_heads" in row.options}
        if not any(rows[layer].heads for layer in with_heads):
            found.setdefault("num_heads", "layer")
        if with_heads == {"ViG"} and self.graph_aggregation == "edge":  # one linear for all features
            found["num_heads"] = "graph_aggregation"
        return found

    @staticmethod
    def drop_overridden(values: dict, given: dict) -> dict:
        """Drop the values of a YAML file that the command line makes void.

        Another data set has other statistics, another layer other options; the same layer may be defined in another file. A
        test with the config.yaml of a training evaluates the trained weights, not the ones that training started from, and
        exports nothing. Generated images of another size are not resized to the former one.
        """
        dropped = default_statistics(values) if "dataset" in given else set()
        if "layer" in given:
            is_same = layer_label(str(given["layer"])) == layer_label(str(values.get("layer")))
            dropped |= {"layer_sha256"} if is_same else {"layer_sha256", "mixer_option"}
        if str(values.get("test_only")).lower() == "false" and str(given.get("test_only")).lower() == "true":
            dropped |= {"checkpoint", "export"}
        if "task_size" in given:
            dropped.add("resize")
        return {name: value for name, value in values.items() if name not in dropped}


preset_option = functools.partial(option, decided=True)  # an option whose default depends on `model`
