"""The teacher's cache: what is read back is what the teacher says, and the losses on it are what they claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from residency.compress.bild import BiLD, BiLDParams, bild
from residency.compress.distillation import Distillation
from residency.compress.kl import KL, KLParams, kl
from residency.compress.teacher import CachedTeacher, LiveTeacher, TopK, kl_of_top_k, record, with_ids
from residency.errors import DataError, PlanError
from residency.fusedhead import log_sum_exp, top_k_logits
from residency.objective import Head, Outputs
from residency.tokens import Encoded


def model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def items(n: int = 7) -> list[Encoded]:
    return [Encoded(f"r{i}", tuple(range(1, 3 + i % 4)), tuple(range(5 + i, 9 + 2 * i))) for i in range(n)]


def value(objective: Distillation, student: LlamaForCausalLM, batch: dict) -> tuple[torch.Tensor, int]:
    hidden = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    total, count = objective(Outputs(hidden=hidden.hidden_states[-1], head=Head(student.lm_head.weight)), batch)
    return total, int(count)


@pytest.mark.parametrize("loss", [BiLD(), KL(KLParams(temperature=2.0))])
def test_hidden_states_serve_every_loss_as_the_live_teacher_does(tmp_path, loss):
    teacher, student = LiveTeacher(model(0, 3)), model(1)
    record(teacher, items(), tmp_path / "cache", address="a", batch=3)
    cached = CachedTeacher(tmp_path / "cache", teacher.head)
    batch = with_ids([items()[i] for i in (5, 0, 3)], pad=0)  # another order, other padding
    live, count = value(Distillation(loss, teacher, 0.3), student, batch)
    stored, same = value(Distillation(loss, cached, 0.3), student, batch)
    assert count == same == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-6)


def test_a_whole_top_k_serves_kl_and_teacher_led_bild_exactly(tmp_path):
    teacher, student = LiveTeacher(model(0, 3)), model(1)
    record(teacher, items(), tmp_path / "cache", address="a", what="top-k", k=50)
    cached = CachedTeacher(tmp_path / "cache")
    batch = with_ids(items(), pad=0)
    for loss in (KL(), BiLD(BiLDParams(directions="teacher"))):
        live, _ = value(Distillation(loss, teacher), student, batch)
        stored, _ = value(Distillation(loss, cached), student, batch)
        torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-6)


def test_other_losses_are_refused_from_a_top_k_cache(tmp_path):
    record(LiveTeacher(model()), items(2), tmp_path / "cache", address="a", what="top-k", k=8)
    cached = CachedTeacher(tmp_path / "cache")
    for loss in (BiLD(), KL(KLParams(temperature=3.0))):
        with pytest.raises(PlanError, match="top-k cache"):
            Distillation(loss, cached)


def test_kl_of_the_top_k_is_the_divergence_of_the_bucketed_distributions():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weight, other = (torch.randn(23, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    said = TopK(*reversed(top_k_logits(hidden, Head(other), 4)), log_sum_exp(hidden, Head(other)))
    mine = hidden.clone().requires_grad_(True)
    head = Head(weight.clone().requires_grad_(True), torch.randn(23, generator=generator, dtype=torch.float64))
    total = kl_of_top_k(mine, head, said, chunk_bytes=8 * 23 * 2)
    total.backward()

    reference = hidden.clone().requires_grad_(True)
    W = weight.clone().requires_grad_(True)
    q, p = F.softmax(reference @ W.T + head.bias, -1), F.softmax(hidden @ other.T, -1)

    def bucketed(x: torch.Tensor) -> torch.Tensor:
        known = x.gather(1, said.words)
        return torch.cat([known, 1 - known.sum(1, keepdim=True)], 1)

    expected = F.kl_div(bucketed(q).log(), bucketed(p), reduction="sum")
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(head.weight.grad, W.grad, rtol=1e-7, atol=1e-9)
    full, _ = kl(hidden @ weight.T + head.bias, hidden @ other.T)
    assert float(total) <= float(full)


def test_a_confident_teacher_leaves_no_rest_and_nothing_breaks():
    hidden = torch.randn(3, 4)
    weight = torch.randn(11, 4)
    logits = torch.full((3, 11), -1e4)
    logits[:, 2] = 1e4
    values, words = logits.topk(3)
    said = TopK(words, values, logits.logsumexp(1))
    mine = (1e3 * hidden).requires_grad_(True)
    total = kl_of_top_k(mine, Head(weight), said)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(mine.grad).all()


def test_log_sum_exp_is_torchs():
    hidden, weight, bias = torch.randn(9, 4), torch.randn(31, 4), torch.randn(31)
    got = log_sum_exp(hidden, Head(weight, bias), chunk_bytes=31 * 4 * 2)
    torch.testing.assert_close(got, (hidden @ weight.T + bias).logsumexp(1))


def test_the_cache_is_written_once_and_damage_is_seen(tmp_path):
    teacher, folder = LiveTeacher(model()), tmp_path / "cache"
    record(teacher, items(), folder, address="a")
    before = (folder / "hidden.f32").stat().st_mtime_ns
    record(teacher, items(), folder, address="a")
    assert (folder / "hidden.f32").stat().st_mtime_ns == before
    record(teacher, items(3), folder, address="b")
    assert set(CachedTeacher(folder, teacher.head).index["rows"]) == {"r0", "r1", "r2"}
    with (folder / "hidden.f32").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="damaged"):
        CachedTeacher(folder, teacher.head)


def test_bad_rows_are_refused(tmp_path):
    teacher = LiveTeacher(model())
    with pytest.raises(PlanError, match="share an id"):
        record(teacher, [items()[0], items()[0]], tmp_path / "cache", address="a")
    with pytest.raises(PlanError, match="vocabulary"):
        record(teacher, items(), tmp_path / "cache", address="a", what="top-k", k=51)
    assert not (tmp_path / "cache").exists()
    record(teacher, items(2), tmp_path / "cache", address="a")
    cached = CachedTeacher(tmp_path / "cache", teacher.head)
    stranger = with_ids([Encoded("new", (1, 2), (3, 4))], pad=0)
    with pytest.raises(DataError, match="lacks this row"):
        value(Distillation(KL(), cached), model(1), stranger)
    longer = with_ids([Encoded("r0", (1, 2), (3, 4, 5, 6, 7, 8))], pad=0)
    with pytest.raises(DataError, match="cache holds"):
        value(Distillation(KL(), cached), model(1), longer)


def test_bild_of_the_top_k_reads_the_cached_words_only():
    """A cache of 8 words gives teacher-led BiLD exactly, whatever the other words are."""
    from residency.compress.teacher import bild_of_top_k

    hidden, weight, other = torch.randn(5, 4), torch.randn(40, 4), torch.randn(40, 4)
    values, words = top_k_logits(hidden, Head(other), 8)
    said = TopK(words, values, log_sum_exp(hidden, Head(other)))
    params = BiLDParams(k=8, directions="teacher")
    expected, _ = bild(hidden @ weight.T, hidden @ other.T, params)
    torch.testing.assert_close(bild_of_top_k(hidden, Head(weight), said, params), expected)


def test_a_larger_student_is_kept_from_words_its_teacher_does_not_have():
    """KL among the shared words and `outside_sum` are KL to the teacher with zero probability elsewhere."""
    from residency.compress.distillation import outside_sum

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    mine, head = hidden.clone().requires_grad_(True), Head(weight.clone().requires_grad_(True))
    among, _ = kl(head(mine)[:, :20], teacher)
    total = among + outside_sum(mine, head, 20)
    total.backward()
    reference, W = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    p = torch.cat([teacher.softmax(1), torch.zeros(5, 10, dtype=torch.float64)], 1)
    expected = F.kl_div((reference @ W.T).log_softmax(1), p, reduction="sum")
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(mine.grad, reference.grad)
    torch.testing.assert_close(head.weight.grad, W.grad)


def test_killed_recordings_are_cleared(tmp_path):
    (tmp_path / ".tmp-dead-cache").mkdir()
    (tmp_path / ".tmp-dead-cache" / "hidden.f32").write_bytes(b"half")
    record(LiveTeacher(model()), items(2), tmp_path / "cache", address="a")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
