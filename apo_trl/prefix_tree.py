"""Each distinct token of a batch once: no padding, and every prefix that rows share computed a single time.

The rows of a batch, sorted by their tokens, form a tree: each adds only what follows its longest common start with the
row before it. The added pieces stand one after another in one packed row; each attends to its path from the root. For a
pair that is `[shared | rest of one | rest of the other]`. Attention is the host's SDPA, once for each row; the language
model's head scores each distinct (position, next token) once, and the results are put back where TRL expects them.

Left out on purpose: approximation. A model or a batch that cannot be served takes the host's path.
"""

import functools
import inspect
import logging
import sys
import types
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .data.reading import shared_start

__all__ = ["PrefixTrees", "Tree", "plant"]

logger = logging.getLogger(__name__)

_NAME = "prefix_tree_"
_PLAIN = {"input_ids", "attention_mask", "use_cache"}  # what a batch of text is passed as
_BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")  # all the same function, computed differently

# Architectures that the tests compare with the host's path; any other is compared on its first batch.
TESTED = {
    "llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "phi3", "gemma3_text", "gpt_neox", "gpt2", "qwen3_moe",
}  # fmt: skip


class Piece(NamedTuple):
    """What one row adds: the packed tokens [start, end), and where the tokens before them on its path lie."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...]

    @property
    def depth(self) -> int:
        """How many tokens lie before the first one added."""
        return sum(end - start for start, end in self.before)


class Tree:
    """The layout of a batch.

    Args:
        input_ids: Tokens, shape (rows, T).
        attention_mask: 1 where there is a token, shape (rows, T); padding may be on either side.
        labels: The tokens again where they are scored, else -100, shape (rows, T).
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        device = input_ids.device
        ids, real, scored = input_ids.tolist(), attention_mask.bool().tolist(), (labels != -100).tolist()
        tokens = [
            [token for token, is_real in zip(*row, strict=True) if is_real] for row in zip(ids, real, strict=True)
        ]
        self.pieces: list[Piece] = []
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        packed: list[int] = []
        positions: list[int] = []
        places: dict[int, list[int]] = {}  # of each row, where its tokens are packed
        last: list[int] = []
        path: tuple[tuple[int, int], ...] = ()
        for row in sorted(range(len(tokens)), key=tokens.__getitem__):
            shared = shared_start(tokens[row], last)
            added = tokens[row][shared:]
            before = _cut(path, shared)
            start, end = len(packed), len(packed) + len(added)
            places[row] = [place for first, stop in before for place in range(first, stop)] + list(range(start, end))
            if added:
                self.pieces.append(Piece(start, end, before))
                packed += added
                positions += range(shared, len(tokens[row]))
            path = (*before, (start, end)) if added else before
            last = tokens[row]

        asked: dict[tuple[int, int], int] = {}  # (packed place, next token) -> number
        self._back: list[int] = []
        self.orphans = False  # a scored token with none before it
        for row, flags in enumerate(scored):
            at = 0
            for column, flag in enumerate(flags):
                if flag and column:
                    if not at or not real[row][column]:
                        self.orphans = True
                        return
                    question = (places[row][at - 1], ids[row][column])
                    self._back.append(asked.setdefault(question, len(asked)))
                at += real[row][column]
        self.scored = labels[:, 1:] != -100
        self.padded, self.computed = input_ids.numel(), len(packed)
        self.input_ids = torch.tensor([packed], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.places = torch.tensor([place for place, _ in asked], device=device, dtype=torch.long)
        self.targets = torch.tensor([[target for _, target in asked]], device=device, dtype=torch.long)
        # A mask of four dimensions is passed on as it is, and ours is not looked at: attention knows the tree.
        self.attention_mask = torch.zeros(1, 1, 1, 1, device=device)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Let each row's tokens attend to their path: from (1, heads, packed, size) to (1, packed, heads, size)."""
        window = kwargs.pop("sliding_window", None)
        outputs = []
        for number, piece in enumerate(self.pieces):
            spans = [*piece.before, (piece.start, piece.end)]
            keys, values = (
                torch.cat([tensor[:, :, start:end] for start, end in spans], dim=2) if piece.before
                else tensor[:, :, piece.start : piece.end]
                for tensor in (key, value)
            )  # fmt: skip
            mask = self._mask(number, piece, window)
            part = query[:, :, piece.start : piece.end]
            outputs.append(
                sdpa_attention_forward(module, part, keys, values, mask, is_causal=mask is None, **kwargs)[0]
            )
        return torch.cat(outputs, dim=1), None

    def _mask(self, number: int, piece: Piece, window: int | None) -> Tensor | None:
        """Give what the tokens of a piece may see of their path, or None where that is plainly causal; made once."""
        depth, size = piece.depth, piece.end - piece.start
        if window is not None and window >= depth + size:
            window = None
        if not depth and window is None:
            return None
        if (number, window) not in self._masks:
            mask = torch.ones(size, depth + size, dtype=torch.bool, device=self.input_ids.device).tril(depth)
            if window is not None:
                mask = mask.triu(depth - window + 1)
            self._masks[number, window] = mask[None, None]
        return self._masks[number, window]

    def unpack(self, outputs: Any) -> Any:
        """Put what the head said of each distinct question where the host looks for it, shapes (rows, T - 1)."""
        back = torch.tensor(self._back, device=self.places.device, dtype=torch.long)
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            values = getattr(outputs, name)
            if values is not None:
                empty = values.new_zeros(self.scored.shape)
                setattr(outputs, name, empty.masked_scatter(self.scored.to(values.device), values[0][back]))
        outputs.label_mask = self.scored
        outputs.loss = -outputs.log_probs.sum() / self.scored.sum().clamp(min=1)
        return outputs


def _cut(path: tuple[tuple[int, int], ...], length: int) -> tuple[tuple[int, int], ...]:
    """Give the first `length` tokens of a path."""
    kept: list[tuple[int, int]] = []
    for start, end in path:
        if length <= 0:
            break
        kept.append((start, min(end, start + length)))
        length -= end - start
    return tuple(kept)


class PrefixTrees:
    """What `plant` put on a model: `saved` is the last batch's padded over computed tokens.

    `reason` says why the host's path is taken, and is empty where it is not.
    """

    def __init__(self) -> None:
        self.saved = 1.0
        self.reason = ""
        self.checked = False

    def give_up(self, reason: str) -> None:
        """Take the host's path from now on, and say why, once."""
        if not self.reason:
            self.reason = reason
            logger.warning(f"padding_free has no effect: {reason}. Training goes on as TRL does it, with padding.")


def plant(model: Any) -> PrefixTrees:
    """Have a causal language model with TRL's fused head compute each distinct token of a batch once.

    Call it after `trl.trainer.utils.add_fused_lm_head`. Generation and every call without `fused_lm_head` stay as they
    are.
    """
    trees = PrefixTrees()
    if is_peft_model(model):
        if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
            trees.give_up("prompt learning puts tokens before each row")
            return trees
        model = model.get_base_model()
    config = model.config.get_text_config()
    if reason := _obstacle(model, config):
        trees.give_up(reason)
        return trees
    base = _base(config)
    _register(base)
    model.set_attn_implementation(_NAME + base)
    trees.checked = config.model_type in TESTED
    fused = model.forward
    if _only_asked not in model.base_model._forward_hooks.values():  # a second trainer of the same model
        model.base_model.register_forward_hook(_only_asked, with_kwargs=True)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        # Of a copy of the model, the copy's own.
        host = functools.partial(fused.__func__, self) if inspect.ismethod(fused) else fused

        def as_host() -> Any:
            given = {} if labels is None else {"labels": labels}
            return host(*args, fused_lm_head=fused_lm_head, **given, **kwargs)

        if not fused_lm_head or labels is None or trees.reason:
            return as_host()
        # PEFT's models name all that a causal language model can be given, most of it None.
        other = {name for name, value in kwargs.items() if value is not None} - _PLAIN
        if args or other or kwargs.get("input_ids") is None:
            trees.give_up(f"a batch has {', '.join(sorted(other)) or 'no input_ids'}")
            return as_host()
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        tree = Tree(ids, torch.ones_like(ids) if mask is None else mask, labels)
        if tree.orphans or not tree.targets.numel():
            return as_host()  # this batch alone
        if not trees.checked and not _agrees(trees, tree, host, as_host):
            return as_host()
        trees.saved = tree.padded / tree.computed
        return tree.unpack(_forward(host, tree))

    model.forward = types.MethodType(forward, model)
    return trees


def _forward(fused: Any, tree: Tree) -> Any:
    return fused(
        input_ids=tree.input_ids,
        attention_mask=tree.attention_mask,
        position_ids=tree.position_ids,
        shift_labels=tree.targets,
        prefix_tree=tree,
        fused_lm_head=True,
    )


def _agrees(trees: PrefixTrees, tree: Tree, fused: Any, as_host: Any) -> bool:
    """Compare both paths on the first batch of an architecture that the tests do not know."""
    trees.checked = True
    with torch.no_grad():
        expected = as_host().log_probs
        try:
            found = tree.unpack(_forward(fused, tree)).log_probs
        except (TypeError, ValueError, RuntimeError) as error:
            trees.give_up(f"the model cannot take it ({str(error).splitlines()[0][:200]})")
            return False
    close = 1e-4 if expected.dtype == torch.float32 and not torch.is_autocast_enabled() else 0.1
    difference = (found - expected).abs().max().item()
    if not difference <= close:
        trees.give_up(f"log-probs of the first batch differ from the host's by {difference:.1e}")
        return False
    return True


def _only_asked(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Leave the head only the places at which something is scored."""
    tree = kwargs.get("prefix_tree")
    if tree is not None:
        output.last_hidden_state = output.last_hidden_state[:, tree.places]
    return output


def _obstacle(model: Any, config: Any) -> str:
    """Say why a model cannot be served, or nothing."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps attention logits"
    if config is not model.config:
        return "the model takes more than text"
    if getattr(config, "output_router_logits", False):
        return "the router's auxiliary loss needs the padded batch"
    if _base(config) not in _BASES:
        return f"the attention implementation {_base(config)} cannot be split by rows"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"the model has layers that are no attention ({', '.join(sorted(kinds))})"
    if getattr(model, "_is_stateful", False):
        return "the model is recurrent"
    return ""


def _base(config: Any) -> str:
    """Name the model's own attention, also where its configuration came from a model that was planted on."""
    return str(config._attn_implementation).removeprefix(_NAME)


def _register(base: str) -> None:
    """Register an attention that falls through to `base` where a call carries no tree."""
    name = _NAME + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, prefix_tree: Any = None, **kwargs: Any
    ) -> Any:  # fmt: skip
        if prefix_tree is not None:
            for refused in ("softcap", "s_aux", "position_bias"):
                if kwargs.get(refused) is not None:
                    raise ValueError(f"its attention uses {refused}")
            return prefix_tree.attend(module, query, key, value, **kwargs)
        if base == "eager":
            host = sys.modules[type(module).__module__].eager_attention_forward
        else:
            host = ALL_ATTENTION_FUNCTIONS[base]
        return host(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
