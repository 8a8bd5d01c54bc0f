"""The sparse decode path: equal to the dense one for any mask, shape and dtype, and nothing more is read."""

import copy
import pickle
import shutil
import time
import warnings

import pytest
import torch
import transformers
from test_relufy import MODELS, L, build, ids, logits, relufy
from torch import nn
from torch.testing import assert_close

from residency.compress import sparseffn, sparsekernel
from residency.compress.relufy import FATReLU, gated_ffns, set_thresholds
from residency.compress.sparseffn import SparseFFN, install_sparse_ffn, sparse_decoding
from residency.compress.sparsespeed import decode_speed, speed_against_sparsity
from residency.compress.sparsity import measure_sparsity
from residency.errors import MissingError, PlanError

needs_c = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
PATHS = [pytest.param("c", marks=needs_c), "torch"]
SHAPES = [(576, 1536), (577, 130), (64, 7), (5, 3), (1, 1), (33, 64)]


class Gated(nn.Module):
    def __init__(self, d, f, bias=False, act=None, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=bias, dtype=dtype), nn.Linear(d, f, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(f, d, bias=bias, dtype=dtype)
        self.act_fn = act or nn.ReLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tolerance(dtype):
    return {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 5e-3}


def between(gates, share):
    """A threshold that silences about a share of the gates and lies on none of them, where rounding would decide."""
    values = gates.flatten().sort().values
    at = min(int(share * len(values)), len(values) - 2)
    return max(0.0, (values[at] + values[at + 1]).item() / 2) if len(values) > 1 else 0.0


@pytest.mark.parametrize("use", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sparse_is_dense(use, shape, dtype):
    d, f = shape
    own = Gated(d, f, dtype=dtype)
    for B in (1, 2, 4):
        x = torch.randn(B, d, generator=torch.Generator().manual_seed(B)).to(dtype)
        gates = own.gate_proj(x).float()
        for share in (0.0, 0.5, 0.8, 0.95):
            own.act_fn = FATReLU(between(gates, share))
            expected = own(x)
            sparse = SparseFFN(own, use)
            assert_close(sparse(x), expected, **tolerance(dtype))
            assert_close(sparse(x[:, None]), expected[:, None], **tolerance(dtype))
            assert sparse(x).dtype == dtype
            assert_close(sparse.dense(x), expected, **tolerance(dtype))


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_mask_and_only_active_rows_are_read(dtype):
    d, f = 40, 96
    kernel = sparsekernel.kernel()
    generator = torch.Generator().manual_seed(0)
    for active in ([], [0], [95], [3, 4, 5, 6, 7], list(range(0, 96, 3)), list(range(96))):
        gate, up, down = (torch.randn(f, d, generator=generator).to(dtype) for _ in range(3))
        x = torch.rand(1, d, generator=generator).to(dtype) + 1
        silent = torch.ones(f, dtype=torch.bool)
        silent[active] = False
        gate = torch.where(silent[:, None], -gate.abs(), gate.abs())
        expected = (torch.relu(x @ gate.T) * (x @ up.T)) @ down
        up[silent], down[silent] = torch.nan, torch.inf  # would be seen
        y = kernel(x, gate, up, down, 0.0)
        assert kernel.active == len(active)
        assert_close(
            y, expected, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=1e-3 if dtype == torch.float32 else 1
        )
        if not active:
            assert not y.any()


@pytest.mark.parametrize("use", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_none_active_is_exactly_zero(use, dtype):
    ffn = SparseFFN(Gated(48, 64, act=FATReLU(1e30), dtype=dtype), use)
    for B in (1, 3):
        y = ffn(torch.randn(B, 48).to(dtype))
        assert y.shape == (B, 48)
        assert not y.any()


@pytest.mark.parametrize("use", PATHS)
def test_ties_and_nan_are_as_in_the_activation(use):
    own = Gated(4, 3, act=FATReLU(0.5))
    own.gate_proj.weight.copy_(torch.tensor([[0.5, 0, 0, 0], [0.25, 0, 0, 0], [0.75, 0, 0, 0]]))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expected = own(x)
    sparse = SparseFFN(own, use)
    assert_close(sparse(x), expected)
    own.act_fn = sparse.act_fn = FATReLU(0.5000001)
    assert (sparse(x) - expected).abs().max() > 1e-3  # the tie went
    assert_close(sparse(x), sparse.dense(x))
    assert sparse(torch.tensor([[torch.nan, 0, 0, 0]])).isnan().all()


def test_half_precision_threshold_is_rounded_like_the_activation_does():
    own = Gated(8, 64, act=FATReLU(0.1), dtype=torch.bfloat16)
    own.gate_proj.weight.zero_()
    own.gate_proj.weight[:, 0] = torch.tensor(0.1, dtype=torch.bfloat16)  # not 0.1
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    x[0, :2] = 1
    expected = own(x)
    assert expected.any()
    assert_close(SparseFFN(own)(x), expected, **tolerance(torch.bfloat16))


@pytest.mark.parametrize("use", ["auto", "torch"])
def test_biases(use):
    own = Gated(20, 30, bias=True)
    x = torch.randn(1, 20)
    expected = own(x)
    assert_close(SparseFFN(own, use)(x), expected)
    own.act_fn = FATReLU(1e30)
    assert_close(SparseFFN(own, use)(x)[0], own.down_proj.bias, rtol=0, atol=0)
    if sparsekernel.kernel():
        with pytest.raises(MissingError, match="bias"):
            SparseFFN(own, "c")


@needs_c
def test_threads_divide_the_rows_and_the_result_does_not_wobble(monkeypatch):
    monkeypatch.setattr(sparsekernel, "GRAIN", 1)
    own, x = Gated(64, 37), torch.randn(2, 64)
    expected, sparse = own(x), SparseFFN(own, "c")
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            first = sparse(x)
            assert_close(first, expected)
            assert all(torch.equal(sparse(x), first) for _ in range(20))
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------ in a model


@pytest.mark.parametrize("use", PATHS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama-bias"])
def test_decoding_in_a_model(name, use):
    model = relufy(build(name), [0.0, 0.2, 1.0])
    tokens = ids(1, 6)
    expected = logits(model, tokens)
    wanted = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    install_sparse_ffn(model, use)
    cache, got = None, []
    for t in range(6):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    assert_close(torch.cat(got, 1), expected, rtol=1e-3, atol=1e-3)
    assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)  # prefill
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_checkpoint_stays_standard(name, tmp_path):
    model = relufy(build(name), 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "dense")
    install_sparse_ffn(model)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)
    model.save_pretrained(tmp_path / "sparse")
    dense, sparse = (p.read_bytes() for p in ((tmp_path / n / "model.safetensors") for n in ("dense", "sparse")))
    assert dense == sparse
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    set_thresholds(loaded, 0.1)
    assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_weights_are_shared_and_cannot_go_stale():
    model = relufy(build())
    held = sum(p.nbytes for p in model.parameters())
    install_sparse_ffn(model)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == held
    other = relufy(build(seed=5))
    model.load_state_dict(other.state_dict())
    token = ids(1, 1)
    assert_close(logits(model, token), logits(other, token), rtol=1e-4, atol=1e-4)
    for ffn in gated_ffns(model):
        ffn.down_proj.weight.data = ffn.down_proj.weight.data.contiguous()  # exchanged: usual layout
    assert_close(logits(model, token), logits(other, token), rtol=1e-4, atol=1e-4)
    moved = copy.deepcopy(model).bfloat16()
    assert logits(moved, token).dtype == torch.bfloat16
    assert_close(logits(pickle.loads(pickle.dumps(model)), token), logits(model, token), rtol=0, atol=0)


def test_install_and_remove_leave_the_model_as_it_was():
    model = relufy(build())
    modules = [type(m) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    before = logits(model)
    with sparse_decoding(model):
        assert all(isinstance(f, SparseFFN) for f in gated_ffns(model))
        install_sparse_ffn(model)  # twice is once
        assert not any(isinstance(m, SparseFFN) for f in gated_ffns(model) for m in f.children())
        set_thresholds(model, 0.2)
    assert [type(m) for m in model.modules()] == [t if t is not nn.ReLU else FATReLU for t in modules]
    set_thresholds(model, 0)
    assert [p.stride() for p in model.parameters()] == strides
    assert_close(logits(model), before, rtol=0, atol=0)


def test_hooks_training_and_autocast_see_the_dense_path():
    model = install_sparse_ffn(relufy(build()))
    token = ids(1, 1)
    assert measure_sparsity(model, [{"input_ids": token}]).mean > 0.2
    with torch.enable_grad():
        model(token).logits.sum().backward()
    assert all(f.up_proj.weight.grad is not None for f in gated_ffns(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(token).logits.isfinite().all()


def test_an_adapter_that_comes_later_is_heard():
    import peft

    model, token = relufy(build()), ids(1, 1)
    twin = copy.deepcopy(model)
    install_sparse_ffn(model)
    for each in (model, twin):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), each)
    assert_close(logits(model, token), logits(twin, token), rtol=1e-4, atol=1e-4)


def test_empty_and_long_inputs():
    ffn = SparseFFN(Gated(8, 16))
    assert ffn(torch.empty(0, 8)).shape == (0, 8)
    assert ffn(torch.empty(2, 0, 8)).shape == (2, 0, 8)
    x = torch.randn(3, sparseffn.MAX_TOKENS, 8)
    assert torch.equal(ffn(x), ffn.dense(x))


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(PlanError, match="SiLU"):
        install_sparse_ffn(build())
    with pytest.raises(PlanError, match="SiLU"):
        SparseFFN(Gated(4, 4, act=nn.SiLU()))

    class Scaled(Gated):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(PlanError, match="Scaled is not down"):
        SparseFFN(Scaled(4, 4))
    import peft

    model = relufy(build())
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["layers.2.mlp.up_proj"]), model)
    with pytest.raises(PlanError, match="up_proj is a"):
        install_sparse_ffn(model)
    assert not any(isinstance(m, SparseFFN) for m in model.modules())
    with pytest.raises(PlanError, match="in memory"):
        SparseFFN(Gated(4, 4).to("meta"))
    assert L == 3


# ------------------------------------------------------------------ the kernel's making


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path))
    sparsekernel.kernel.cache_clear()
    own, x = Gated(16, 32), torch.randn(1, 16)
    expected = own(x)
    try:
        with pytest.warns(RuntimeWarning, match="the sparse kernel is not available"):
            assert sparsekernel.kernel() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ffn = SparseFFN(own)  # said once
        assert "torch" in repr(ffn)
        assert_close(ffn(x), expected)
        with pytest.raises(MissingError, match="C compiler"):
            SparseFFN(own, "c")
        sparsekernel.kernel.cache_clear()
        monkeypatch.setenv("RESIDENCY_NO_KERNEL", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sparsekernel.kernel() is None
    finally:
        sparsekernel.kernel.cache_clear()


@needs_c
def test_a_broken_compiler_is_named_and_a_damaged_library_is_made_again(monkeypatch, tmp_path):
    file = sparsekernel.build(tmp_path)
    stamp = file.stat().st_mtime_ns
    assert sparsekernel.build(tmp_path) == file
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:100])
    assert sparsekernel.build(tmp_path) == file
    own, x = Gated(16, 32), torch.randn(1, 16)
    again = sparsekernel.Kernel(file)
    y = again(x, own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight.t().contiguous(), 0.0)
    assert_close(y, own(x))
    for bad in (x.double(), x[:, :8], x.t()):
        with pytest.raises(ValueError, match="the kernel takes"):
            again(bad, own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight.t().contiguous(), 0.0)
    with pytest.raises(ValueError, match="the kernel takes"):
        again(x, own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight.t(), 0.0)
    monkeypatch.setattr(sparsekernel, "FLAGS", (*sparsekernel.FLAGS, "-DAHEAD=broken"))
    with pytest.raises(RuntimeError, match="broken"):
        sparsekernel.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [file.parent.name]


# ------------------------------------------------------------------ speed


@needs_c
def test_less_is_read_less_time_is_taken():
    # generous: the measured ratio is above 2 (benchmarks/sparse_ffn.py); here only that sparsity is what pays
    own = [Gated(576, 1536, seed=i) for i in range(12)]  # 127 MB, beyond the caches
    x = torch.randn(1, 576)
    ffns = [SparseFFN(f, "c") for f in own]

    def seconds(share):
        for f in ffns:
            f.act_fn = FATReLU(max(0.0, f.gate_proj(x).quantile(share).item()))
        best = float("inf")
        for _ in range(7):
            start = time.thread_time()
            for f in ffns:
                f(x)
            best = min(best, time.thread_time() - start)
        return best

    assert seconds(0.97) < 0.75 * seconds(0.5)


def test_speeds_are_measured_and_nothing_stays_behind():
    model = relufy(build(), 0.1)
    before = logits(model)
    found = speed_against_sparsity(model, shares=(0.5, 0.9), repeats=2)
    assert [set(row) for row in found] == [{"sparsity", "dense_ms", "sparse_ms", "speedup"}] * 2
    assert found[1]["sparsity"] == pytest.approx(0.9, abs=0.05)
    assert decode_speed(model, [3, 4], new_tokens=3, repeats=1) > 0
    assert_close(logits(model), before, rtol=0, atol=0)
    assert not any(isinstance(m, SparseFFN) for m in model.modules())
