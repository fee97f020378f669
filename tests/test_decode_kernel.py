"""The fused decode attention against float64 attention over the dequantized tokens.

Without a GPU the portable kernel runs in Triton's interpreter, on few tokens; the GPU tests run the real sizes and the
fast kernel.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

from kivicache.buffer import TokenBuffer
from kivicache.packing import pack
from kivicache.quantization import dequantize, quantize
from kivicache.rotation import hadamard
from kivicache.triton.decode import decode_attention
from kivicache.triton.operands import Pair, Store, Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}
# the fast kernel rounds p and q * scale to float16
FAST_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 8e-3}
PER_TOKEN = 0  # group_size: all of head_dim


def roomy(x):
    """A buffer of the tokens ``x`` in a larger allocation, whose spare capacity is poison."""
    poison = torch.nan if x.is_floating_point() else 12345
    capacity = -(-(x.shape[2] + 40) // 8) * 8  # as TokenBuffer's
    data = torch.full((*x.shape[:2], capacity, x.shape[3]), poison, dtype=x.dtype, device=x.device)
    data[:, :, 8 : 8 + x.shape[2]] = x
    buffer = TokenBuffer.of(data)
    buffer.start, buffer.stop = 8, 8 + x.shape[2]
    return buffer


def packed_store(states, nbits, group_size, axis, rotated):
    """The packed tokens as the kernel takes them, and dequantized; ``states`` float32 of the stored dtype's values."""
    if nbits == 16:
        return states, None, None, states
    states = hadamard(states) if rotated else states
    codes, scale, minimum = quantize(states, nbits, group_size, axis)
    restored = dequantize(codes, scale, minimum, group_size, axis)
    return pack(codes, nbits), scale, minimum, hadamard(restored.double()).float() if rotated else restored


class Problem:
    """Random inputs of ``decode_attention`` and what it must return."""

    def __init__(
        self,
        nbits=(2, 2),
        head_dim=64,
        heads=(4, 2),
        batch=1,
        query_length=1,
        packed=(64, 64),
        sinks=0,
        newest=20,
        group_size=32,
        axes=("channel", "token"),
        dtype=torch.float16,
        mask=None,
        scale=None,
        softcap=0.0,
        device=DEVICE,
        magnitude=None,
        value_dim=None,
        rotated=False,
        s_aux=False,
        head_bits=None,
    ):
        query_heads, kv_heads = heads
        head_dims = head_dim, value_dim or head_dim
        head_bits = head_bits or [nbits] * kv_heads  # (key, value) bits of each kv head
        total = sinks + max(packed) + newest
        self.query = torch.randn(batch, query_heads, query_length, head_dim, device=device).to(dtype)
        self.tokens, self.stores, dense = [], [], []
        for side in range(2):
            states = torch.randn(batch, kv_heads, total, head_dims[side], device=device)
            if side == 0:  # a few channels of keys are larger than the others
                states = states * (1 + 2 * (torch.randperm(head_dim, device=device) < head_dim // 20))
                states += torch.randn(head_dim, device=device)
            if magnitude is not None:
                states = magnitude(self, side, states)
            states = states.to(dtype).float()
            middle, last = sinks, sinks + packed[side]
            size = group_size or head_dims[side]
            read_back, stores = states.clone(), {}
            for bits in sorted({b[side] for b in head_bits}):
                members = [head for head in range(kv_heads) if head_bits[head][side] == bits]
                *store, restored = packed_store(states[:, members, middle:last], bits, size, axes[side], rotated)
                store = [store[0].to(dtype)] * 3 if bits == 16 else store
                stores[bits] = members, Store(*map(roomy, store), bits, size)
                read_back[:, members, middle:last] = restored
            self.stores.append(stores)
            full = (roomy(x.to(dtype)) for x in (states[:, :, :middle], states[:, :, last:]))
            self.tokens.append(Tokens(*full, axes[side]))
            dense.append(read_back)
        self.mask = self.make_mask(mask, batch, query_heads, query_length, total, dtype, device)
        self.s_aux = torch.randn(query_heads, device=device).to(dtype) * 3 if s_aux else None
        self.options = {"scale": scale, "softcap": softcap, "rotated": rotated, "s_aux": self.s_aux}
        self.expected = self.attention(*dense, scale, softcap)

    @property
    def pairs(self):
        """One pair where all heads have the same bits, else the heads of each pair of bits."""
        keys, values = self.stores
        if len(keys) == len(values) == 1:
            ((_, key_store),), ((_, value_store),) = keys.values(), values.values()
            return [Pair(key_store, value_store)]
        pairs = []
        for in_keys, key_store in keys.values():
            for in_values, value_store in values.values():
                heads = [head for head in in_keys if head in in_values]
                places = [heads, [in_keys.index(h) for h in heads], [in_values.index(h) for h in heads]]
                if heads:
                    device = self.query.device
                    pairs.append(Pair(key_store, value_store, torch.tensor(places, dtype=torch.int32, device=device)))
        return pairs

    @staticmethod
    def make_mask(kind, batch, heads, query_length, total, dtype, device):
        if kind is None:
            return None
        if kind == "window":  # causal, and no token that is 50 or more before
            distance = torch.arange(total - query_length, total, device=device)[:, None] - torch.arange(
                total, device=device
            )
            return ((distance >= 0) & (distance < 50)).repeat(batch, 1, 1, 1)
        if kind == "padding":  # left padding as long as a tile and more, and causality
            visible = torch.ones(query_length, total, dtype=torch.bool, device=device).tril(total - query_length)
            mask = visible.repeat(batch, 1, 1, 1)
            mask[0, :, :, : total // 2] = False
            return mask
        mask_heads = heads if kind == "additive per head" else 1
        mask = torch.randn(batch, mask_heads, query_length, total, device=device).to(dtype)
        return mask.masked_fill(torch.rand_like(mask, dtype=torch.float32) < 0.3, -torch.inf)

    def attention(self, keys, values, scale, softcap):
        repeats = self.query.shape[1] // keys.shape[1]
        keys, values = (x.double().repeat_interleave(repeats, dim=1) for x in (keys, values))
        scores = self.query.double() @ keys.mT * (self.query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -torch.inf)
        elif self.mask is not None:
            scores = scores + self.mask.double()
        if self.s_aux is not None:
            aux = self.s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, aux], dim=-1)
        return scores.softmax(-1)[..., : values.shape[2]] @ values

    def run(self, **kwargs):
        return decode_attention(self.query, *self.tokens, self.pairs, mask=self.mask, **self.options, **kwargs)

    def error(self, **kwargs):
        """The relative norm of the difference."""
        output = self.run(**kwargs)
        assert output.shape == self.expected.shape and output.dtype == self.query.dtype
        return ((output.double() - self.expected).norm() / self.expected.norm()).item()


# Each case differs from the default in a few things; every format, mask and size appears, not every combination.
CASES = [
    {},
    {"nbits": (4, 2), "dtype": torch.bfloat16, "mask": "padding"},
    {"nbits": (8, 4), "dtype": torch.float32, "sinks": 5},
    {"nbits": (2, 8), "group_size": 64, "sinks": 32, "newest": 40},
    {"nbits": (4, 4), "axes": ("token", "channel"), "mask": "additive"},
    {"nbits": (8, 8), "axes": ("token", "token"), "group_size": PER_TOKEN, "dtype": torch.bfloat16},
    {"nbits": (2, 4), "axes": ("channel", "channel"), "group_size": 128, "packed": (128, 128)},
    {"nbits": (16, 2), "sinks": 5, "newest": 33, "mask": "padding"},
    {"nbits": (4, 16), "newest": 31, "softcap": 15.0},
    {"nbits": (16, 16), "newest": 70, "dtype": torch.float32},
    {"nbits": (2, 2), "head_dim": 80, "dtype": torch.float32, "mask": "additive per head", "heads": (3, 1)},
    {"nbits": (4, 4), "head_dim": 80, "axes": ("token", "token"), "newest": 0},
    {"nbits": (2, 4), "head_dim": 96, "softcap": 30.0, "scale": 0.2, "batch": 2, "mask": "padding"},
    {"nbits": (4, 8), "head_dim": 128, "heads": (8, 1), "query_length": 2, "mask": "additive"},
    {"nbits": (8, 2), "head_dim": 192, "heads": (2, 2), "packed": (32, 32)},
    {"nbits": (4, 2), "head_dim": 256, "heads": (2, 1), "packed": (32, 32), "dtype": torch.bfloat16},
    {"heads": (16, 1), "query_length": 16, "mask": "padding"},
    {"heads": (5, 1), "query_length": 3, "mask": "padding", "dtype": torch.float32},
    {"packed": (64, 35), "newest": 1},  # keys hold more packed tokens than values,
    {"packed": (32, 61), "sinks": 5, "mask": "padding", "query_length": 2},  # or fewer
    {"packed": (0, 40), "sinks": 32, "newest": 5},
    {"packed": (96, 96), "newest": 0, "batch": 3, "mask": "padding"},
    {"group_size": 16, "packed": (48, 50), "dtype": torch.bfloat16},
    {"group_size": 24, "packed": (72, 72), "nbits": (4, 4)},
    {"nbits": (4, 4), "axes": ("channel", "channel"), "group_size": 8},
    {"head_dim": 64, "value_dim": 32, "mask": "padding"},
    {"nbits": (8, 4), "head_dim": 96, "value_dim": 128, "dtype": torch.float32},
    {"rotated": True, "sinks": 5},
    {"rotated": True, "head_dim": 80, "nbits": (4, 2), "packed": (64, 35), "mask": "padding", "dtype": torch.float32},
    {"rotated": True, "nbits": (2, 16), "sinks": 32, "packed": (32, 61)},
    {"rotated": True, "nbits": (16, 2), "dtype": torch.bfloat16},
    {"rotated": True, "nbits": (4, 4), "head_dim": 128, "s_aux": True, "query_length": 3, "mask": "padding"},
    {"s_aux": True, "heads": (8, 2), "query_length": 2, "mask": "additive"},
    {"head_bits": [(2, 4), (8, 2), (2, 2)], "heads": (6, 3), "batch": 2, "sinks": 5, "mask": "padding"},
    {"head_bits": [(16, 4), (2, 16)], "heads": (2, 2), "dtype": torch.float32},
    {"head_bits": [(4, 4), (16, 2)], "heads": (4, 2), "rotated": True},
    {"mask": "window", "query_length": 4, "packed": (64, 64)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_portable_kernel(case):
    problem = Problem(**case)
    assert problem.error(fast=False, splits=2) <= TOLERANCE[problem.query.dtype]


@pytest.mark.parametrize("splits", [1, 3, 7])
def test_any_number_of_splits(splits):
    """More splits than tiles leave some with nothing to do."""
    assert Problem(newest=9, sinks=3).error(fast=False, splits=splits) <= TOLERANCE[torch.float16]


def test_own_number_of_splits():
    assert Problem().error(fast=False) <= TOLERANCE[torch.float16]


def test_a_row_that_sees_nothing_is_zero():
    problem = Problem(batch=2, mask="padding")
    problem.mask[0] = False
    output = problem.run(fast=False, splits=2)
    assert (output[0] == 0).all() and output[1].isfinite().all()


def test_lengths_on_the_device():
    """The tensors are capacities: what lies beyond the lengths does not count."""
    problem = Problem(packed=(64, 64), sinks=5, newest=20)
    lengths = torch.tensor([5, 32, 32, 5 + 32 + 7], dtype=torch.int32, device=DEVICE)
    whole = problem.run(fast=False, splits=2, lengths=lengths)
    for tokens, stores in zip(problem.tokens, problem.stores, strict=True):
        tokens.newest.truncate(7)
        for _, store in stores.values():
            for buffer in store[:3]:
                buffer.truncate(len(buffer) // 2)
    assert torch.equal(whole, problem.run(fast=False, splits=2))


def test_keys_and_values_of_different_lengths_are_refused():
    problem = Problem()
    problem.tokens[1].newest.truncate(19)
    with pytest.raises(ValueError, match="keys hold 84 tokens, values 83"):
        problem.run()


@pytest.mark.skipif(DEVICE == "cuda", reason="decode_nvidia serves here")
def test_the_fast_kernel_says_why_not():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        Problem().run(fast=True)


def large(problem, side, states):
    """Keys with channels in the hundreds, met by large queries, and one token that wins every softmax."""
    if side == 1:
        return states * 30
    states[..., ::8] *= 200
    states[..., 1::8] += 300
    problem.query *= 40
    best = problem.query[:, :: problem.query.shape[1] // states.shape[1], 0].float().sign()
    states[:, :, 40] = best * 300
    return states


@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_magnitudes(nbits, dtype):
    problem = Problem(nbits=nbits, dtype=dtype, heads=(2, 2), magnitude=large)
    assert problem.error(fast=False, splits=2) <= TOLERANCE[dtype]


def quiet(problem, side, states):
    """The first token outweighs any other by far, and all the others together weigh as much."""
    if side == 1:
        return states * 0.02
    states *= 0.1
    gain = problem.query.shape[-1] ** 0.5 * torch.tensor(states.shape[2], device=states.device).log()
    query = problem.query[:, :: problem.query.shape[1] // states.shape[1], 0].float()
    states[:, :, 0] = query * gain / query.square().sum(-1, keepdim=True)
    return states


def silent(problem, side, states):
    """Queries that are all zero, as of a token whose embedding is (the padding token's), and next to nothing."""
    problem.query[:, 0] = 0
    problem.query[:, 1] *= 2.0**-20 if problem.query.dtype == torch.float16 else 2.0**-126
    return states


@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_queries_of_zero(nbits, dtype):
    problem = Problem(nbits=nbits, dtype=dtype, heads=(3, 1), magnitude=silent)
    assert problem.error(fast=False, splits=2) <= TOLERANCE[dtype]


# The same on a GPU, with sizes that fill it. `fast=None` is the library's own choice.


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("nbits", [(2, 2), (2, 4), (4, 2), (4, 4), (8, 2), (4, 8), (8, 8)], ids=str)
@pytest.mark.parametrize(
    ("heads", "query_length", "mask"),
    [
        ((8, 8), 1, None),
        ((8, 2), 1, "padding"),
        ((7, 1), 2, "additive"),
        ((16, 1), 1, "additive per head"),
        ((8, 2), 16, "padding"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_own_choice(head_dim, nbits, heads, query_length, mask, dtype):
    problem = Problem(
        nbits, head_dim, heads, 2, query_length, (1984, 1984), sinks=32, newest=161, mask=mask, dtype=dtype
    )
    assert problem.error() <= FAST_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [(2, 2), (4, 2), (2, 8), (8, 4)], ids=str)
@pytest.mark.parametrize(("group_size", "head_dim"), [(32, 64), (64, 128), (64, 256), (128, 256)], ids=str)
@pytest.mark.parametrize("packed", [(128, 128), (640, 597), (640, 768), (128, 129), (1152, 1152)], ids=str)
def test_gpu_fast_groups(nbits, group_size, head_dim, packed):
    """Groups as large as a part of a tile, as a tile and as two; they may end within a tile."""
    for sinks, newest in ((0, 33), (5, 160)):
        problem = Problem(
            nbits,
            head_dim,
            (4, 1),
            2,
            packed=packed,
            sinks=sinks,
            newest=newest,
            group_size=group_size,
            mask="padding",
        )
        assert problem.error(fast=True) <= FAST_TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_every_format(case):
    packed = tuple(8 * count for count in case.get("packed", (64, 64)))
    problem = Problem(**case | {"packed": packed})
    assert problem.error() <= FAST_TOLERANCE.get(problem.query.dtype, 1e-4)
    assert problem.error(fast=False) <= FAST_TOLERANCE.get(problem.query.dtype, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("newest", [0, 1, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("packed", [(0, 0), (32, 32), (64, 64), (96, 96), (640, 597), (640, 768), (32, 33)], ids=str)
def test_gpu_lengths_around_the_edges_of_tiles(nbits, newest, packed):
    for sinks in (0, 5, 32):
        if sinks + max(packed) + newest:
            problem = Problem(nbits, 128, (4, 1), 2, packed=packed, sinks=sinks, newest=newest)
            assert problem.error(fast=True) <= FAST_TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("scale", [None, 0.02, 1.0])
@pytest.mark.parametrize("mask", [None, "padding", "additive"])
def test_gpu_scale_and_softcap(softcap, scale, mask):
    problem = Problem((4, 4), 128, packed=(1024, 1024), sinks=32, mask=mask, softcap=softcap, scale=scale)
    assert problem.error(fast=True) <= 2 * FAST_TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_gpu_large_magnitudes(nbits, dtype, additive):
    problem = Problem(nbits, 128, (4, 4), packed=(1024, 1024), dtype=dtype, magnitude=large)
    if additive:  # another path in the kernel, the same result
        problem.mask = torch.zeros(1, 1, 1, 1024 + 20, dtype=dtype, device=DEVICE)
    assert problem.error(fast=True) <= FAST_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_queries_of_zero(nbits, dtype):
    problem = Problem(nbits, 128, (3, 1), packed=(1024, 1024), dtype=dtype, magnitude=silent)
    assert problem.error(fast=True) <= FAST_TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("nbits", [(2, 2), (4, 4), (8, 8)], ids=str)
def test_gpu_one_token_far_above_all_others(nbits):
    """The others' weights are small numbers each and half of the attention together: none may round to 0."""
    for splits in (1, 8):
        problem = Problem(nbits, 128, (2, 2), packed=(32768, 32768), sinks=4, newest=0, magnitude=quiet)
        assert problem.error(fast=True, splits=splits) <= 3e-2


@pytest.mark.gpu
def test_gpu_a_captured_graph_follows_the_lengths():
    problem = Problem((2, 2), 128, (8, 2), packed=(992, 992), sinks=32, newest=176)
    for fast in (True, False):
        lengths = torch.tensor([32, 992, 992, 1200], dtype=torch.int32, device=DEVICE)
        problem.run(fast=fast, lengths=lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = problem.run(fast=fast, lengths=lengths)
        graph.replay()
        assert ((output.double() - problem.expected).norm() / problem.expected.norm()).item() <= 4e-3
        lengths.copy_(torch.tensor([32, 640, 640, 32 + 640 + 100], dtype=torch.int32))
        graph.replay()
        again = problem.run(fast=fast, lengths=lengths)
        assert output.isfinite().all() and torch.equal(output, again)
