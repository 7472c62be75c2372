"""The packed layout and the masks of SDPA's blocks, against a walk along each row in plain Python."""

import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.dpo_trainer import DataCollatorForPreference

import apo_trl.prefix_sharing.layout as layout
from apo_trl.io.prompt import common_prefix_length
from apo_trl.prefix_sharing import PackedBatch, PackingCollator, pack, sdpa
from apo_trl.prefix_sharing.attention import gather, install
from apo_trl.prefix_sharing.sdpa import Plan, split_attention

FIELDS = PackedBatch.__annotations__
SMALL = settings(max_examples=150, deadline=None, derandomize=True)

# A batch is a list of rows, a row a list of cells: a token, whether it is scored, and whether it is there.
PAD = (7, False, False)
cell = st.builds(lambda token, scored: (token, scored, True), st.integers(0, 2), st.booleans())
gappy_rows = st.lists(cell | cell | st.just(PAD), max_size=7)
token_lists = st.lists(st.integers(0, 2), max_size=6)


def row(text, scored_from=1):
    return [(int(token), column >= scored_from, True) for column, token in enumerate(text)]


def aligned(rows, left=False):
    width = max(1, *map(len, rows))
    return [[PAD] * (width - len(row)) + row if left else row + [PAD] * (width - len(row)) for row in rows]


@st.composite
def batches(draw):
    """Rows over three tokens: as TRL pads them, on either side, or with gaps and labels anywhere, padding included."""
    if draw(st.booleans()):
        pairs = draw(st.lists(st.tuples(token_lists.filter(bool), token_lists), min_size=1, max_size=6))
        return aligned([row(prompt + completion, len(prompt)) for prompt, completion in pairs], draw(st.booleans()))
    rows = draw(st.lists(gappy_rows, min_size=1, max_size=6))
    rows = aligned(rows + draw(st.lists(st.sampled_from(rows), max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        rows[draw(st.integers(0, len(rows) - 1))][-1] = (7, True, False)
    return rows


def tensors(rows):
    """The batch as `pack` takes it; tokens under padding must not matter."""
    ids, scored, mask = torch.tensor(rows).unbind(2)
    return ids, mask, ids.masked_fill(scored == 0, -100)


def real_tokens(row):
    return [token for token, _, real in row if real]


def paths(packed):
    """The packed places on each row's path, in the order of its tokens."""
    keys = packed.gather_index.tolist()
    ends = packed.cu_seq_lens_k.tolist()
    return [keys[start:stop] for start, stop in pairwise(ends)]


def shifted_questions(rows):
    """For every label that counts, in row order: where it lies in the shifted labels, its context and its token."""
    width = len(rows[0])
    for number, row in enumerate(rows):
        for column, (token, scored, real) in enumerate(row):
            if column and scored:
                yield number * (width - 1) + column - 1, tuple(real_tokens(row[:column])) if real else (), token


@SMALL
@given(batches())
@example(aligned([row("12"), row("121")]))
@example([row("12", 0)])
@example([[PAD, *row("1", 0)]])
@example([[*row("1"), PAD, *row("1", 0)], row("112", 2)])
@example([[*row("11"), (7, True, False)]])
def test_the_layout_against_a_walk_along_each_row(rows):
    packed = pack(*tensors(rows))
    questions = list(shifted_questions(rows))
    if not questions or any(not context for _, context, _ in questions):
        assert packed is None
        return
    assert packed is not None
    assert packed.shape == (len(rows), len(rows[0]))
    tokens, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()

    # Each distinct token once: as many as the trie of the rows has nodes.
    nodes = {tuple(real_tokens(row)[: end + 1]) for row in rows for end in range(len(real_tokens(row)))}
    assert packed.computed_tokens == len(tokens) == len(nodes)

    # Each path spells a row, and every row is a path or the beginning of one.
    spelled = [tuple(tokens[at] for at in path) for path in paths(packed)]
    texts = {tuple(real_tokens(row)) for row in rows} - {()}
    assert len(set(spelled)) == len(spelled)
    assert set(spelled) <= texts
    assert all(any(path[: len(text)] == text for path in spelled) for text in texts)

    # A path ends in the tokens that its row adds, in order; these are the packed sequence, and its positions.
    starts = packed.cu_seq_lens_q.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(tokens)
    place_of = {}
    for path, text, start, stop in zip(paths(packed), spelled, starts[:-1], starts[1:], strict=True):
        assert stop > start
        assert path[-(stop - start) :] == list(range(start, stop))
        for depth, at in enumerate(path):
            assert positions[at] == depth
            assert place_of.setdefault(text[: depth + 1], at) == at
    assert packed.query_lengths == [stop - start for start, stop in pairwise(starts)]
    assert packed.key_lengths == [len(path) for path in spelled]
    assert (packed.max_length_q, packed.max_length_k) == (max(packed.query_lengths), max(map(len, spelled)))

    # Each distinct (context, next token) is asked once, of the packed token that ends the context.
    asked = list(zip(packed.question_index.tolist(), packed.targets[0].tolist(), strict=True))
    assert len(asked) == len({(context, token) for _, context, token in questions})
    answers = zip(packed.label_index.tolist(), packed.answer_index.tolist(), strict=True)
    got = {label: asked[answer] for label, answer in answers}
    assert len(got) == len(packed.label_index)
    assert got == {label: (place_of[context], token) for label, context, token in questions}


@SMALL
@given(batches(), st.none() | st.integers(1, 9), st.sampled_from([1, 4, 16, 60, 1 << 22]))
@example([row("012012012012"), row("012012012011")], 3, 4)
def test_blocks_see_what_each_token_may_see(rows, window, elements):
    packed = pack(*tensors(rows))
    if packed is None:
        return
    before, sdpa._MASK_ELEMENTS = sdpa._MASK_ELEMENTS, elements
    try:
        plan = Plan(packed, window, torch.zeros(1))
    finally:
        sdpa._MASK_ELEMENTS = before
    for blocks, queries, keys in zip(plan.rows, packed.query_lengths, packed.key_lengths, strict=True):
        got = torch.zeros(queries, keys, dtype=torch.long)
        for block in blocks:
            assert 0 <= block.start < block.stop <= queries
            assert 0 <= block.first < block.last <= keys
            shape = block.stop - block.start, block.last - block.first
            mask = plan.mask(block)
            if mask is None:  # what `is_causal` means to SDPA, or one query that sees all keys
                assert shape[0] in (1, shape[1])
                seen = torch.ones(shape).tril(shape[1] - shape[0])
            else:
                assert mask.shape == shape
                # At least one query is computed in a block, however small the limit; a window needs its own width.
                assert mask.numel() <= max(elements, shape[1])
                assert set(mask.flatten().tolist()) <= {0.0, -math.inf}
                seen = mask == 0
            got[block.start : block.stop, block.first : block.last] += seen.long()
        allowed = [
            [0 <= keys - queries + query - key < (window or math.inf) for key in range(keys)]
            for query in range(queries)
        ]
        assert got.tolist() == [[int(value) for value in line] for line in allowed]


@pytest.mark.parametrize("elements", [1, 24, 1 << 22])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 5)], ids=["one head size", "values of another size"])
def test_attention_in_blocks_is_attention(monkeypatch, elements, window, size):
    """Outputs and gradients of grouped heads against a softmax written out over each row's whole path."""
    monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", elements)
    packed = pack(*tensors([row("01201201201", 4), row("01201222222", 4), row("22222222221", 10)]))
    generator = torch.Generator().manual_seed(0)

    def heads(number, width):
        count = packed.computed_tokens
        return torch.randn(count, number, width, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = heads(4, size[0]), heads(2, size[0]), heads(2, size[1])
    output = split_attention(
        query, gather(key, packed.gather_index), gather(value, packed.gather_index), packed, 0.3, window
    )
    expected = []
    for path, added in zip(paths(packed), packed.query_lengths, strict=True):
        for depth in range(len(path) - added, len(path)):
            seen = path[max(0, depth - (window or depth + 1) + 1) : depth + 1]
            keys, values = (tensor[seen].repeat_interleave(2, 1) for tensor in (key, value))
            weights = torch.softmax(torch.einsum("hd,khd->hk", query[path[depth]], keys) * 0.3, -1)
            expected.append(torch.einsum("hk,khd->hd", weights, values))
    expected = torch.stack(expected)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(output, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix_length(one, other):
    length = common_prefix_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


def test_tokens_and_masks_of_any_type():
    ids, mask, labels = tensors([[(300, 0, 1), (70000, 1, 1)], [(300, 0, 1), (2**31 - 1, 1, 1)]])
    expected = pack(ids, mask, labels)
    assert sorted(expected.input_ids[0].tolist()) == [300, 70000, 2**31 - 1]
    for other in (mask.bool(), mask.int(), mask.float(), None):
        packed = pack(ids, other, labels)
        assert [getattr(packed, name).tolist() for name in FIELDS] == [
            getattr(expected, name).tolist() for name in FIELDS
        ]


PAIR = aligned([row("121"), row("12")])


def test_offsets_are_what_flash_kernels_take():
    packed = pack(*tensors(PAIR))
    assert packed.cu_seq_lens_q.dtype == packed.cu_seq_lens_k.dtype == torch.int32
    assert all(isinstance(length, int) for length in (packed.max_length_q, packed.max_length_k))
    assert packed.input_ids.shape == packed.position_ids.shape == (1, 3)


class TestMoving:
    def test_a_pickle_keeps_everything(self):
        packed = pack(*tensors(PAIR))
        again = pickle.loads(pickle.dumps(packed))
        for name in (*FIELDS, "query_lengths", "key_lengths", "shape"):
            one, other = getattr(packed, name), getattr(again, name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name

    def test_to_another_device_moves_every_index_once(self, monkeypatch):
        packed = pack(*tensors(PAIR))
        moved = []
        to = torch.Tensor.to
        monkeypatch.setattr(
            torch.Tensor, "to", lambda self, *args, **kwargs: moved.append(self) or to(self, *args, **kwargs)
        )
        assert packed.to("meta") is packed
        assert all(getattr(packed, name).device.type == "meta" for name in FIELDS)
        assert packed.cu_seq_lens_q.dtype == torch.int32
        assert len([tensor for tensor in moved if tensor.device.type == "cpu"]) == 1
        moved.clear()
        packed.to("meta")
        packed.to(torch.device("meta"))
        assert moved == []

    def test_pinning_pins_every_index_by_one_copy(self, monkeypatch):
        packed = pack(*tensors(PAIR))
        pinned = []
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
        before = {name: getattr(packed, name).tolist() for name in FIELDS}
        assert packed.pin_memory() is packed
        assert len(pinned) == 1
        assert {name: getattr(packed, name).tolist() for name in FIELDS} == before
        storage = packed._numbers.untyped_storage().data_ptr()
        assert storage != pinned[0].untyped_storage().data_ptr()
        assert all(
            getattr(packed, name).untyped_storage().data_ptr() == storage
            for name in FIELDS
            if not name.startswith("cu_seq_lens")
        )


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation gives."""

    largest = calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1000])
def test_a_long_row_has_no_mask_of_its_square(window, monkeypatch):
    """Two completions of 6,000 tokens after one prompt of 6,000: a mask of a row has 6,000 x 12,000 elements."""
    monkeypatch.setattr(sdpa, "_MASK_ELEMENTS", 1 << 20)
    length = 6_000
    ids = torch.arange(2 * length).repeat(2, 1)
    ids[1, length:] += 10 * length
    labels = ids.clone()
    labels[:, :length] = -100
    packed = pack(ids, None, labels)
    assert (packed.query_lengths, packed.key_lengths) == ([2 * length, length], [2 * length] * 2)
    query, key, value = (torch.randn(1, heads, 3 * length, 8, requires_grad=True) for heads in (2, 1, 1))
    attention = ALL_ATTENTION_FUNCTIONS[install("sdpa")]
    with LargestTensor() as seen:
        output, _ = attention(None, query, key, value, None, packed_batch=packed, sliding_window=window)
        output.sum().backward()
    assert output.shape == (1, 3 * length, 2, 8)
    assert seen.calls > 10
    # All blocks share one mask, and no other tensor is larger.
    (plan,) = packed.plans.values()
    assert 0 < plan.band.numel() <= 2 * sdpa._MASK_ELEMENTS
    assert seen.largest <= 2 * sdpa._MASK_ELEMENTS < length * 2 * length / 30
    assert output.isfinite().all()
    assert query.grad.isfinite().all()


class TestCollator:
    EXAMPLES = [  # noqa: RUF012
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8, 11]},
        {"prompt_ids": [5, 6], "chosen_ids": [9], "rejected_ids": [8]},
    ]

    def test_adds_the_layout_of_its_batch(self):
        batch = PackingCollator(DataCollatorForPreference(pad_token_id=0))(self.EXAMPLES)
        plain = DataCollatorForPreference(pad_token_id=0)(self.EXAMPLES)
        assert set(batch) == {*plain, "packed_batch"}
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        expected = pack(batch["input_ids"], batch["attention_mask"], labels)
        packed = batch["packed_batch"]
        assert packed.computed_tokens == 9  # 5 6 7, 8 9 10, 11, and 9 and 8 after the shorter prompt
        for name in FIELDS:
            assert torch.equal(getattr(packed, name), getattr(expected, name)), name

    def test_in_a_worker_of_the_loader(self):
        collator = PackingCollator(DataCollatorForPreference(pad_token_id=0))
        (batch,) = DataLoader(self.EXAMPLES, batch_size=2, collate_fn=collator, num_workers=1)
        expected = collator(self.EXAMPLES)["packed_batch"]
        assert isinstance(batch["packed_batch"], PackedBatch)
        for name in FIELDS:
            assert torch.equal(getattr(batch["packed_batch"], name), getattr(expected, name)), name

    def test_a_batch_that_cannot_be_packed_has_no_layout(self):
        empty = [{"prompt_ids": [5, 6], "chosen_ids": [], "rejected_ids": []}]
        assert "packed_batch" not in PackingCollator(DataCollatorForPreference(pad_token_id=0))(empty)

    @pytest.mark.parametrize("other", [{"pixel_values": 1}, {"input_ids": torch.ones(2, 2)}, {}], ids=str)
    def test_leaves_other_batches_alone(self, other, monkeypatch):
        monkeypatch.setattr(layout, "pack", None)
        assert PackingCollator(lambda examples: other)([]) is other
        assert "packed_batch" not in other
