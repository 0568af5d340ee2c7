"""Cache of a hybrid: a flat list of transformers' own cache layers, seen by each path through a view of its slice."""

from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, LinearAttentionCacheLayerMixin

from .configuration_manticore import ManticoreConfig


class SliceCache(Cache):
    """
    The cache as one path's slice sees it: as many layers as the uncut component has, the real ones in [start, stop),
    placeholders outside. The layer objects are those of the parent, so reordering and cropping the parent is enough.
    """

    def __init__(self, parent: "ManticoreCache", layers: list, start: int, depth: int):
        placeholders = [DummyLayer() for _ in range(depth)]
        super().__init__(layers=placeholders[:start] + layers + placeholders[start + len(layers) :])
        self.parent = parent
        self.ahead = 0  # tokens of the current forward pass that this slice has already been fed, one at a time

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that this slice has seen. Linear layers do not count them, so the parent does."""
        return self.parent.get_seq_length() + self.ahead

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(kv_length, kv_offset) of the layer; of a full-attention layer where the index names no attention layer."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            return layer.get_mask_sizes(query_length)
        return self.get_seq_length() + query_length, 0


class ManticoreCache(Cache):
    """
    Cache of a whole hybrid. Every path owns the cache layers of its slice, also where slices overlap or repeat:
    two paths that shared the state of a recurrent layer would silently overwrite each other's.

    Args:
        config (`ManticoreConfig`): the hybrid's configuration.
    """

    is_compileable = False

    def __init__(self, config: ManticoreConfig):
        owned, layers = {}, []
        for b, block in enumerate(config.blocks):
            for p, path in enumerate(block):
                complete = DynamicCache(config=config.components[path["component"]]).layers
                owned[b, p] = complete[path["start"] : path["stop"]]
                layers.extend(owned[b, p])
        super().__init__(layers=layers)
        self.seen_tokens = 0
        self._views = {
            (b, p): SliceCache(
                self, owned[b, p], config.blocks[b][p]["start"], config.depth(config.blocks[b][p]["component"])
            )
            for b, p in owned
        }

    def view(self, block: int, path: int) -> SliceCache:
        """The part of the cache that belongs to one path."""
        return self._views[block, path]

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer holds a state that all earlier tokens went into, so that padding must come first."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def advance(self, tokens: int) -> None:
        """Count tokens that a forward pass has just written into every layer."""
        self.seen_tokens += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv_length, kv_offset) for `query_length` new tokens."""
        return self.seen_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last `-tokens_to_remove` tokens (a number <= 0, as transformers counts).

        Raises:
            ValueError: some layer holds a recurrent state, which cannot forget its last tokens.
        """
        if tokens_to_remove < 0 and not self.is_croppable:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, allowed is 0: the recurrent states in this cache cannot "
                "forget their last tokens. Keep a copy (`copy.deepcopy(cache)`) of the cache to come back to."
            )
        super().crop(tokens_to_remove)
        self.seen_tokens += min(tokens_to_remove, 0)

    def reset(self) -> None:
        """Empty every layer and the token count."""
        super().reset()
        self.seen_tokens = 0


__all__ = ["ManticoreCache"]
