"""Every mistake in a call: its class, and a message that says expected, got and remedy."""

import re

import pytest
import torch

import nlkernels
from nlkernels import NonLocalBlock3d, nonlocal_attention

Q, K, V = torch.ones(2, 9, 4), torch.ones(2, 7, 4), torch.ones(2, 7, 3)

CALLS = {
    "not_a_tensor": ((Q.numpy(), K, V), {}, TypeError, "query to be a tensor, got ndarray"),
    "heads": (
        (Q[:, None], K[:, None], V[:, None]),
        {},
        ValueError,
        "query of 3 dimensions .* got (2, 1, 9, 4) float32 on cpu; there is one head: fold heads",
    ),
    "rank": ((Q, K[0], V), {}, ValueError, "key of 3 dimensions .* got (7, 4)"),
    "batch": ((Q, K[:1], V), {}, ValueError, "all share B"),
    "depth": ((Q[..., :3], K, V), {}, ValueError, "query (2, 9, 3) float32"),
    "keys": ((Q, K, V[:, :5]), {}, ValueError, "key and value share M"),
    "no_channels": ((Q[..., :0], K[..., :0], V), {}, ValueError, "D and V must be 1 or more"),
    "no_keys": ((Q, K[:, :0], V[:, :0]), {}, ValueError, "got M = 0"),
    "integers": ((Q.long(), K.long(), V.long()), {}, TypeError, "int64.*cast them"),
    "mixed_dtypes": ((Q, K.double(), V), {}, TypeError, "key (2, 7, 4) float64"),
    "mixed_devices": ((Q, K.to("meta"), V), {}, ValueError, "one device.*on meta.*move them"),
    "kind": ((Q, K, V), {"kind": "softmx"}, ValueError, "did you mean 'softmax'"),
    "concat": ((Q, K, V), {"kind": "concat"}, ValueError, "got 'concat'.*call nonlocal_concat("),
    "backend": ((Q, K, V), {"backend": "chunky"}, ValueError, "did you mean 'chunked'"),
    "unserved": ((Q, K, V), {"backend": "sdpa"}, NotImplementedError, "needs D == V"),
    "scale_type": ((Q, K, V), {"scale": "1"}, TypeError, "number or None, got str; pass float"),
    "scale_nan": ((Q, K, V), {"scale": float("nan")}, ValueError, "finite scale, got nan"),
    "workspace": ((Q, K, V), {"workspace_mib": -1}, ValueError, "0 or more, got -1"),
    "workspace_inf": ((Q, K, V), {"workspace_mib": float("inf")}, ValueError, "got inf; None"),
    "workspace_text": ((Q, K, V), {"workspace_mib": "1"}, ValueError, "got '1'; None gives"),
    "sparse": ((Q.to_sparse(), K, V), {}, TypeError, "query to be a dense tensor.*to_dense()"),
    "mask": ((Q, K, V), {"attn_mask": Q}, TypeError, "unexpected keyword argument"),
}


def pattern(text):
    """The message's literal parts, in order."""
    return ".*".join(re.escape(part) for part in text.split(".*"))


@pytest.mark.parametrize("name", CALLS)
def test_attention_refuses_before_it_starts(name):
    operands, options, error, message = CALLS[name]
    with pytest.raises(error, match=pattern(message)) as caught:
        nonlocal_attention(*operands, **options)
    if name != "mask":
        text = str(caught.value)
        assert text.startswith("nonlocal_attention: expected") and ", got " in text and ";" in text


@pytest.mark.parametrize(
    ("op_name", "known"),
    [
        ("nonlocal_attention", "query, key, value, kind, scale, backend, workspace_mib"),
        ("nonlocal_concat", "query_score, key_score, value, backend"),
        ("region_aggregate", "x, weight, backend"),
        ("channel_gate", "x, weight, bias, transform, backend"),
    ],
)
def test_explain_names_the_arguments_of_an_operation(op_name, known):
    message = f"explain: expected arguments of {op_name} out of {known}, got 'attn_mask'; leave it"
    with pytest.raises(TypeError, match=f"^{pattern(message)}"):
        nlkernels.explain(op_name, Q, K, V, attn_mask=Q)


def test_explain_checks_like_the_call():
    with pytest.raises(ValueError, match=r"one of nonlocal_attention, .*got 'atention'"):
        nlkernels.explain("atention", Q, K, V)
    with pytest.raises(ValueError, match="all share B"):
        nlkernels.explain("nonlocal_attention", Q, K[:1], V)


BLOCKS = {
    "dim": ((0,), {}, "dim of 1 or more, got 0"),
    "inner": ((8,), {"inner": -1}, "inner of 1 or more, got -1"),
    "kind": ((8,), {"kind": "gausian"}, "did you mean 'gaussian'"),
    "pool": ((8,), {"pool": (2, 2)}, "three positive sizes (t, h, w) or None, got (2, 2)"),
    "pool_order": ((8,), {"pool_order": "between"}, "one of before, after, got 'between'"),
    "norm": ((8,), {"norm": "layer"}, "norm to be one of batch, affine, got 'layer'"),
    "zero_init": ((8,), {"zero_init": "gama"}, "did you mean 'gamma'"),
    "gamma_without_norm": ((8,), {"norm": None}, "use zero_init='weight'"),
    "init": ((8,), {"init": "xavier"}, "one of normal, kaiming, default"),
    "group": ((8,), {"temporal_group": 0}, "positive number of frames, got 0"),
    "backend": ((8,), {"backend": "cuda12"}, "NonLocalBlock3d: expected backend"),
    "dim_text": (("8",), {}, "dim of 1 or more, got '8'"),
    "dim_none": ((None,), {}, "dim of 1 or more, got None"),
    "pool_number": ((8,), {"pool": 5}, "three positive sizes (t, h, w) or None, got 5"),
    "scale": ((8,), {"scale": float("nan")}, "scale to be a finite number, got nan"),
    "norm_eps": ((8,), {"norm_eps": "x"}, "norm_eps to be a finite number of 0 or more, got 'x'"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_refuses_wrong_options(name):
    arguments, options, message = BLOCKS[name]
    with pytest.raises(ValueError, match=pattern(message)):
        NonLocalBlock3d(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 8, 4, 4), {}, "(B, 8, T, H, W), got (2, 8, 4, 4)"),
        ((2, 4, 4, 4, 4), {}, "built for one number of channels"),
        ((2, 8, 4, 1, 4), {}, "at least (1, 2, 2) to pool, got (4, 1, 4)"),
        ((2, 8, 6, 4, 4), {"temporal_group": 4}, "multiple of temporal_group=4, got T=6"),
    ],
)
def test_block_refuses_wrong_inputs(shape, options, message):
    with pytest.raises(ValueError, match=pattern(message)):
        NonLocalBlock3d(8, **options)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "expected a tensor, got NoneType"),
        (torch.zeros(1, 8, 2, 4, 4).half(), TypeError, "input of torch.float32, got (1, 8"),
        (torch.zeros(1, 8, 2, 4, 4, device="meta"), ValueError, "input on cpu, got (1, 8"),
        (torch.zeros(1, 8, 0, 4, 4), ValueError, "(B, 8, T, H, W), got (1, 8, 0, 4, 4)"),
    ],
    ids=["none", "half", "meta", "empty"],
)
def test_block_refuses_what_its_layers_would_trip_over(x, error, message):
    with pytest.raises(error, match=pattern(message)):
        NonLocalBlock3d(8, pool=None)(x)


def test_attention_map_refuses_positions_outside():
    with pytest.raises(ValueError, match=r"inside \(2, 4, 4\), got \(2, 0, 0\)"):
        NonLocalBlock3d(8).attention_map(torch.zeros(1, 8, 2, 4, 4), (2, 0, 0))
    for wrong in (5, None, (0.5, 1, 1), ("a", 1, 1)):
        with pytest.raises(ValueError, match="positions count from 0"):
            NonLocalBlock3d(8).attention_map(torch.zeros(1, 8, 2, 4, 4), wrong)


def test_switching_a_model_without_blocks_is_an_error():
    with pytest.raises(ValueError, match="non-local blocks, got Linear"):
        nlkernels.set_nonlocal_backend(torch.nn.Linear(2, 2), "chunked")
    with pytest.raises(TypeError, match="expected a module, got str"):
        nlkernels.set_nonlocal_backend("model", "chunked")
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        nlkernels.set_nonlocal_backend(NonLocalBlock3d(8), "referense")
