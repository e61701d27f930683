"""Language models whose blocks share weights: position i of the stack runs with those of block `layer_tie_map[i]`.

Written by `moesurgery tie-blocks` beside the weights, and used by the installed package. It works for every family of
transformers whose blocks stand in `model.layers`: ask this module for `TiedLlamaForCausalLM`, `TiedMixtralForCausalLM`…

config.json holds, besides what the stock family has:

* `layer_tie_map`: for each position the block whose weights it uses; `layer_tie_map[i] <= i`, and a block that is
  used is its own (`layer_tie_map[layer_tie_map[i]] == layer_tie_map[i]`). Its length is the depth of the model.
* `layer_tie_exclude`: tensors of a block in whose name one of these texts is found are not shared.
* `num_hidden_layers: null`: a stock class stops there, where it would fill the tied blocks with random numbers.

Every position keeps its own module, with its own layer index and its own slot in the KV cache; only parameters and
buffers are shared. What is stored is what blocks `layer_tie_map[i] == i` have, and what is not shared of the others.
"""

import re

import transformers

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError as error:
    raise ImportError(
        f"tied blocks need transformers 5 or newer, and this is {transformers.__version__}: upgrade it, or write the"
        " model out in full with `moesurgery tie-blocks MODEL --materialize`"
    ) from error

PREFIX = "tied_"
_BLOCK = re.compile(r"((?:model\.)?layers\.)(\d+)\.(.+)")


class TiedConfigMixin:
    """The config of a stock family, its depth being that of `layer_tie_map`."""

    def __init__(self, **kwargs):
        tie_map = kwargs.get("layer_tie_map")
        if tie_map is not None:
            _check(tie_map)
            kwargs["num_hidden_layers"] = len(tie_map)
        super().__init__(**kwargs)

    def to_diff_dict(self):
        # This is what save_pretrained writes.
        return {**super().to_diff_dict(), "num_hidden_layers": None}


def _check(tie_map):
    used = isinstance(tie_map, list) and all(type(s) is int and 0 <= s <= i for i, s in enumerate(tie_map))
    if not used or not tie_map or any(tie_map[s] != s for s in tie_map):
        raise ValueError(f"layer_tie_map is {tie_map}: each entry names its own position or an earlier one that does")


class TiedModelMixin:
    """A stock model in which the parameters and buffers of some blocks are those of others."""

    def post_init(self):
        self._block_ties = self._ties(self.named_parameters(remove_duplicate=False))
        self._buffer_ties = self._ties(self.named_buffers(remove_duplicate=False))
        super().post_init()
        # What save_pretrained leaves out.
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **self._block_ties, **self._buffer_ties}
        # Prediction layers stand behind the stack in the file; transformers has no module for them.
        depth = len(self.config.layer_tie_map)
        behind = {rf"layers\.{depth + n}\." for n in range(8)}
        self._keys_to_ignore_on_load_unexpected = behind | set(self._keys_to_ignore_on_load_unexpected or ())

    def _ties(self, named):
        sources = self.config.layer_tie_map
        apart = getattr(self.config, "layer_tie_exclude", None) or ()
        ties = {}
        for name, _ in named:
            block = _BLOCK.fullmatch(name)
            if block is None or any(text in block[3] for text in apart):
                continue
            source = sources[int(block[2])]
            if source != int(block[2]):
                ties[name] = f"{block[1]}{source}.{block[3]}"
        return ties

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        # The stock method gives nothing unless the embeddings are tied.
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **self._block_ties}

    def tie_weights(self, missing_keys=None, **kwargs):
        super().tie_weights(missing_keys=missing_keys, **kwargs)
        self._tie_buffers()
        if missing_keys is not None:
            missing_keys.difference_update(self._buffer_ties)

    def _apply(self, fn, recurse=True):
        # Parameters are changed in place by .to(); buffers are replaced, each by its own copy.
        super()._apply(fn, recurse)
        self._tie_buffers()
        return self

    def _tie_buffers(self):
        for target, source in self._buffer_ties.items():
            module, _, leaf = target.rpartition(".")
            setattr(self.get_submodule(module), leaf, self.get_buffer(source))


def __getattr__(name):
    """Make `Tied<Class>` for a class of transformers, or `Tied<Class>Config` for the config class of a model class."""
    if not name.startswith("Tied"):
        raise AttributeError(name)
    base = getattr(transformers, name[4:], None)
    if base is None and name.endswith("Config"):
        model = getattr(transformers, name[4:-6], None)
        base = getattr(model, "config_class", None)
    if base is None:
        raise AttributeError(f"transformers {transformers.__version__} has no {name[4:]}")
    return _tied(base)


def _tied(base):
    """Return the tied class of a stock config or model class, making it on first use."""
    name = "Tied" + base.__name__
    if name in globals():
        return globals()[name]
    if issubclass(base, transformers.PreTrainedConfig):
        model_type = PREFIX + base.model_type
        conversion = get_checkpoint_conversion_mapping(base.model_type)
        if conversion:  # the same names on disk as the stock family
            register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)
        bases, members = (TiedConfigMixin, base), {"model_type": model_type}
        # Subclassing would make an __init__ that skips the mixin's.
        members["__init__"] = TiedConfigMixin.__init__
    else:
        config = _tied(base.config_class)
        bases, members = (TiedModelMixin, base), {"config_class": config, "config": config}
    made = type(name, bases, {"__module__": __name__, "__doc__": f"{base.__name__} with tied blocks.", **members})
    globals()[name] = made
    return made
