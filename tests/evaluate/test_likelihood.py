"""The shared-prefix engine against a loop over single candidates, for many architectures."""

import pytest
import torch
import transformers as tf

from residency.errors import DataError
from residency.evaluate import likelihood
from residency.evaluate.likelihood import answer_logprobs
from residency.modes import evaluating

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def build(name):
    """A small random model; large weights, so that a wrong mask or position shows."""
    torch.manual_seed(0)
    wide = {"initializer_range": 0.3}
    configs = {
        "llama": lambda: tf.LlamaConfig(**SMALL, **wide),
        "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, **wide),
        "qwen2": lambda: tf.Qwen2Config(**SMALL, **wide),
        "mistral-window": lambda: tf.MistralConfig(**SMALL, **wide, sliding_window=7),
        "gemma2-softcap": lambda: tf.Gemma2Config(
            **SMALL, **wide, head_dim=8, sliding_window=6, final_logit_softcapping=2.0, query_pre_attn_scalar=8
        ),
        "granite-scale": lambda: tf.GraniteConfig(**SMALL, **wide, logits_scaling=3.0),
        "bloom-alibi": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, **wide),
        "mixtral": lambda: tf.MixtralConfig(**SMALL, **wide, num_local_experts=4, num_experts_per_tok=2),
        "mamba": lambda: tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **wide),
    }
    return tf.AutoModelForCausalLM.from_config(configs[name]()).eval()


def items(seed=0, n=9, system=5):
    """Prompts of uneven length with a common beginning, uneven candidates, some of them empty or one token long."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=g))
        return torch.randint(1, VOCAB, (length,), generator=g).tolist()

    head = ids(system, system + 1)
    prompts = [head + ids(1, 30) for _ in range(n)]
    answers = [[ids(1, 20) for _ in range(1 + i % 4)] for i in range(n)]
    answers[1].append([])
    answers[2][0] = [3]
    return prompts, answers


@torch.no_grad()
def naive(model, prompts, answers):
    """One candidate at a time, from the definition."""
    table = []
    for prompt, candidates in zip(prompts, answers, strict=True):
        row = []
        for answer in candidates:
            total = 0.0
            if answer:
                logits = model(input_ids=torch.tensor([prompt + answer])).logits.double().log_softmax(-1)[0]
                total = sum(float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
            row.append((total, len(answer)))
        table.append(row)
    return table


def worst(found, expected):
    assert [[n for _, n in row] for row in found] == [[n for _, n in row] for row in expected]
    return max(abs(x - y) for a, b in zip(found, expected, strict=True) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "qwen2", "mistral-window", "gemma2-softcap", "granite-scale", "bloom-alibi", "mixtral", "mamba"],
)
def test_equals_the_loop(name):
    model = build(name)
    prompts, answers = items()
    expected = naive(model, prompts, answers)
    assert worst(answer_logprobs(model, prompts, answers), expected) < 1e-4
    assert worst(answer_logprobs(model, prompts, answers, batch_tokens=1), expected) < 1e-4
    assert worst(answer_logprobs(model, prompts, answers, batch_tokens=90), expected) < 1e-4


def test_the_loop_would_notice():
    model = build("llama")
    prompts, answers = items()
    shifted = [[9, *p[1:]] for p in prompts]
    assert worst(answer_logprobs(model, shifted, answers), naive(model, prompts, answers)) > 0.1


def test_sharing_is_used_where_it_can_be_and_only_there():
    shares = {name: likelihood._shareable(build(name)) for name in ("llama", "gpt2", "gemma2-softcap", "mamba")}
    assert shares == {"llama": True, "gpt2": True, "gemma2-softcap": True, "mamba": False}


def test_runs_fewer_tokens_than_the_loop():
    model = build("llama")
    prompts, answers = items(system=40)
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    answer_logprobs(model, prompts, answers)
    hook.remove()
    loop = sum(len(p) + len(a) for p, c in zip(prompts, answers, strict=True) for a in c if a)
    alone = sum(len(a) for c in answers for a in c)
    assert sum(seen) < 0.5 * loop
    assert sum(seen) > alone  # nothing is skipped


def test_logits_only_where_an_answer_token_is_predicted():
    model = build("llama")
    prompts, answers = items()
    seen = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    answer_logprobs(model, prompts, answers)
    hook.remove()
    assert sum(seen) == sum(len(a) for c in answers for a in c) + 1  # and one for finding out how its cache works


def test_batch_composition_and_order_do_not_matter():
    model = build("gpt2")
    prompts, answers = items()
    together = answer_logprobs(model, prompts, answers)
    alone = [answer_logprobs(model, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    assert worst(together, alone) < 1e-4
    back = answer_logprobs(model, prompts[::-1], answers[::-1])[::-1]
    assert worst(together, back) < 1e-4
    assert answer_logprobs(model, prompts, answers) == together  # and bit by bit the same when repeated


def test_edges():
    model = build("llama")
    assert answer_logprobs(model, [], []) == []
    assert answer_logprobs(model, [[5]], [[]]) == [[]]
    assert answer_logprobs(model, [[5], [6]], [[[]], []]) == [[(0.0, 0)], []]
    twice = ([[5], [5, 6], [5, 6]], [[[7]], [[7, 8]], [[7, 8]]])  # one prompt and answer repeated
    assert worst(answer_logprobs(model, *twice), naive(model, *twice)) < 1e-4
    nested = [[1, 2], [1, 2, 3], [1, 2, 3, 4]]  # each prompt begins the next
    same = [[[9, 9]]] * 3
    assert worst(answer_logprobs(model, nested, same), naive(model, nested, same)) < 1e-4


def test_one_context_with_many_candidates_is_split_and_shared():
    model = build("llama")
    answers = [[[i % VOCAB, (3 * i + 1) % VOCAB, 4][: 1 + i % 3] for i in range(60)]]
    expected = naive(model, [[1, 2, 3, 4]], answers)
    assert worst(answer_logprobs(model, [[1, 2, 3, 4]], answers, batch_tokens=32), expected) < 1e-4


def test_bf16_stays_close():
    model = build("llama").bfloat16()
    prompts, answers = items()
    found, expected = answer_logprobs(model, prompts, answers), naive(model, prompts, answers)
    per_token = max(
        abs(x - y) / n for a, b in zip(found, expected, strict=True) for (x, n), (y, _) in zip(a, b, strict=True) if n
    )
    assert per_token < 0.1


def test_leaves_the_model_as_it_was():
    model = build("llama").train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    prompts, answers = items(n=3)
    answer_logprobs(model, prompts, answers)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_modes_come_back_after_an_error():
    model = build("llama").train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / model.training
    assert model.training


def test_peft_adapters_are_scored():
    peft = pytest.importorskip("peft")
    model = build("llama")
    prompts, answers = items(n=4)
    plain = answer_logprobs(model, prompts, answers)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.eval()
    found = answer_logprobs(wrapped, prompts, answers)
    assert worst(found, naive(wrapped, prompts, answers)) < 1e-4
    assert worst(found, plain) > 0.1


@pytest.mark.parametrize("virtual", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_scored_without_sharing(virtual):
    peft = pytest.importorskip("peft")
    prompts, answers = items(n=4)
    config = getattr(peft, virtual)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(build("llama"), config).eval()
    assert not likelihood._shareable(wrapped)
    found = answer_logprobs(wrapped, prompts, answers)
    for prompt, candidates, scores in zip(prompts, answers, found, strict=True):
        for answer, (total, _) in zip(candidates, scores, strict=True):
            if answer:
                with torch.no_grad():
                    rows = wrapped(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                rows = rows[-len(answer) - 1 : -1]
                assert total == pytest.approx(float(rows[range(len(answer)), answer].sum()), abs=1e-4)
    assert worst(found, naive(build("llama"), prompts, answers)) > 1e-2  # they do something


def test_advance_counts_prompts():
    seen = []
    prompts, answers = items()
    answer_logprobs(build("llama"), prompts, answers, advance=seen.append)
    assert sum(seen) == len(prompts)


def test_bad_input_is_refused():
    model = build("llama")
    with pytest.raises(DataError, match="prompt 1"):
        answer_logprobs(model, [[1], []], [[[2]], [[2]]])
    with pytest.raises(ValueError, match="2 prompts"):
        answer_logprobs(model, [[1], [2]], [[[2]]])
    with pytest.raises(ValueError, match="batch_tokens"):
        answer_logprobs(model, [[1]], [[[2]]], batch_tokens=0)
