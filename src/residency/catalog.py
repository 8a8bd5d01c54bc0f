"""The map of the house: every method and every recipe step, by name. Nothing is imported until it is asked for.

A method row says what it is (name, stage, role, paper), where it lives (`object`), how a recipe reaches it
(`step`), how mature it is and what it needs. A step row ties a recipe key (and its variant, such as `tune: {method:
probe}`) to its class.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from residency.errors import MissingError, ResidencyError

Stage = Literal["curate", "adapt", "compress", "infer", "evaluate", "federate"]
Role = Literal[
    "Scorer",
    "Selector",
    "Augmenter",
    "Objective",
    "Surgery",
    "Decoder",
    "Panel",
    "Metric",
    "Diagnostic",
    "Strategy",
    "Predictor",
]


@dataclass(frozen=True)
class Method:
    """One row of the catalogue.

    Args:
        name: What recipes and the command line call it.
        stage: Which folder of the house it lives in.
        role: Which idiom it speaks (DESIGN: Scorer, Selector, Objective, …).
        title: Title of the paper, or of the standard work for a classic.
        arxiv: arXiv id, or None when there is none (then `reference` says where it is published).
        reference: Authors, venue, year.
        object: `module:attribute` of the class or function.
        step: How a recipe reaches it.
        pain: The user's sentence this method answers.
        status: "stable" passes the whole common suite; "experimental" names what it fails.
        extras: Extras of this package it needs.
    """

    name: str
    stage: Stage
    role: Role
    title: str
    arxiv: str | None
    reference: str
    object: str
    step: str
    pain: str
    status: Literal["stable", "experimental"] = "stable"
    extras: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import and return the method's class or function."""
        return load(self.object, self.extras)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self) | {"extras": list(self.extras)}


@dataclass(frozen=True)
class StepRow:
    """One recipe step: `name`, or `name` with `{selector: variant}`; the first row of a name is its default."""

    name: str
    object: str
    selector: str | None = None
    variant: str | None = None
    summary: str = ""


METHODS: tuple[Method, ...] = (
    Method(
        name="k-shot",
        stage="curate",
        role="Selector",
        title="Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
        arxiv="2408.15915",
        reference="Yang, Qin, Wu et al., 2024 (its data step, Sim-Div)",
        object="residency.curate.simdiv:SimDiv",
        step="curate: {by: k-shot}",
        pain="I have a few good rows and a large mixed pool",
    ),
    Method(
        name="supcon",
        stage="adapt",
        role="Objective",
        title="Supervised Contrastive Learning",
        arxiv="2004.11362",
        reference="Khosla, Teterwak, Wang et al., NeurIPS 2020",
        object="residency.adapt.contrast:SupCon",
        step="tune: {method: spcl, loss: supcon}",
        pain="I want rows of one class together, and have large batches",
    ),
    Method(
        name="spcl",
        stage="adapt",
        role="Objective",
        title="Supervised Prototypical Contrastive Learning for Emotion Recognition in Conversation",
        arxiv="2210.08713",
        reference="Song, Huang, Xue, Hu, EMNLP 2022",
        object="residency.adapt.spcl:SPCL",
        step="tune: {method: spcl}",
        pain="My classes are of very unequal size, my batches small, and labels depend on who speaks",
    ),
    Method(
        name="fopro",
        stage="adapt",
        role="Objective",
        title="FoPro: Few-Shot Guided Robust Webly-Supervised Prototypical Learning",
        arxiv="2212.00465",
        reference="Qin, Chen, Chen et al., AAAI 2023",
        object="residency.adapt.fopro:FoPro",
        step="tune: {method: fopro, noisy: …}",
        pain="I have a few clean rows and many whose labels are often wrong",
    ),
    Method(
        name="capro",
        stage="adapt",
        role="Objective",
        title="CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes",
        arxiv="2310.09761",
        reference="Qin, Chen, Shen et al., NeurIPS 2023",
        object="residency.adapt.capro:CAPro",
        step="tune: {method: capro, noisy: …, texts: …}",
        pain="My labels are wrong in a consistent way, and the captions know better",
    ),
    Method(
        name="label-prompts",
        stage="adapt",
        role="Objective",
        title="Label-Guided Prompt for Multi-label Few-shot Aspect Category Detection",
        arxiv="2407.20673",
        reference="Guan, Zhu, Bai, Wang, 2024 (reconstructed from its abstract)",
        object="residency.adapt.labelprompts:EpisodeLoss",
        step="tune: {method: label-prompts}",
        pain="My texts have several labels at once, and I have five rows of each",
    ),
    Method(
        name="self-training",
        stage="adapt",
        role="Augmenter",
        title="Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training",
        arxiv="1810.07911",
        reference="Zou, Yu, Kumar, Wang, ECCV 2018; as the last stage of Qi et al., 2024 (arXiv 2409.07078)",
        object="residency.adapt.selftraining:self_train",
        step="self-train: {unlabelled: …}",
        pain="I have few labels and many rows without",
    ),
    Method(
        name="lora",
        stage="adapt",
        role="Surgery",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv="2106.09685",
        reference="Hu, Shen, Wallis et al., ICLR 2022 (through PEFT)",
        object="residency.lora:Lora",
        step="tune: {method: lora}",
        pain="Full fine-tuning does not fit or forgets too much",
    ),
    Method(
        name="cross-entropy",
        stage="adapt",
        role="Objective",
        title="Attention Is All You Need",
        arxiv="1706.03762",
        reference="next-token cross-entropy, on the answer's tokens only, LM head fused",
        object="residency.crossentropy:CrossEntropy",
        step="tune: {method: lora}",
        pain="The [tokens × vocabulary] logits do not fit in memory",
    ),
    Method(
        name="label-loss",
        stage="adapt",
        role="Objective",
        title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        arxiv="1810.04805",
        reference="Devlin, Chang, Lee, Toutanova, NAACL 2019 (a fine-tuned encoder under a new head)",
        object="residency.labelloss:LabelLoss",
        step="tune: {method: classify}",
        pain="I want a small classifier or regressor of texts, fine-tuned whole",
    ),
    Method(
        name="probe",
        stage="adapt",
        role="Predictor",
        title="Prototypical Networks for Few-shot Learning",
        arxiv="1703.05175",
        reference="Snell, Swersky, Zemel, NeurIPS 2017 (nearest prototype); logistic regression (linear)",
        object="residency.adapt.probe:Probe",
        step="tune: {method: probe}",
        pain="I want a classifier of images or texts from a few labels, on a frozen encoder",
    ),
    Method(
        name="bild",
        stage="compress",
        role="Objective",
        title="BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation",
        arxiv="2406.13555",
        reference="Li, Zhou, Song, COLING 2025",
        object="residency.compress.bild:BiLD",
        step="distill: {loss: bild}",
        pain="My distilled student copies the long tail of the logits and not the ranking",
    ),
    Method(
        name="kl",
        stage="compress",
        role="Objective",
        title="Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        reference="Hinton, Vinyals, Dean, 2015",
        object="residency.compress.kl:KL",
        step="distill: {loss: kl}",
        pain="I want a smaller model that answers like the large one",
    ),
    Method(
        name="sinkd",
        stage="compress",
        role="Objective",
        title="Sinkhorn Distance Minimization for Knowledge Distillation",
        arxiv="2402.17110",
        reference="Cui, Qin, Gao et al., LREC-COLING 2024",
        object="residency.compress.sinkd:SinKD",
        step="distill: {loss: sinkd}",
        pain="Student and teacher hardly overlap, and KL averages modes or collapses onto one",
    ),
    Method(
        name="reverse-kl",
        stage="compress",
        role="Objective",
        title="MiniLLM: On-Policy Distillation of Large Language Models",
        arxiv="2306.08543",
        reference="Gu, Dong, Wei, Huang, ICLR 2024 (its divergence, per token on given answers)",
        object="residency.compress.divergences:ReverseKL",
        step="distill: {loss: reverse-kl}",
        pain="My small student spreads itself thin and says what the teacher never would",
    ),
    Method(
        name="js",
        stage="compress",
        role="Objective",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        arxiv="2306.13649",
        reference="Agarwal, Vieillard, Zhou et al., ICLR 2024 (generalised Jensen-Shannon divergence)",
        object="residency.compress.divergences:JS",
        step="distill: {loss: js}",
        pain="I want a bounded compromise between covering the teacher and seeking its mode",
    ),
    Method(
        name="skewed-kl",
        stage="compress",
        role="Objective",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        arxiv="2402.03898",
        reference="Ko, Kim, Chen, Yun, ICML 2024",
        object="residency.compress.divergences:SkewedKL",
        step="distill: {loss: skewed-kl}",
        pain="Distillation with KL is unstable where the student gives a word no probability",
    ),
    Method(
        name="tvd",
        stage="compress",
        role="Objective",
        title="f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        arxiv="2307.15190",
        reference="Wen, Li, Du, Mou, ACL 2023 (total variation distance, per token)",
        object="residency.compress.divergences:TVD",
        step="distill: {loss: tvd}",
        pain="A few noisy words of the teacher dominate the distillation loss",
    ),
    Method(
        name="dkd",
        stage="compress",
        role="Objective",
        title="Decoupled Knowledge Distillation",
        arxiv="2203.08679",
        reference="Zhao, Cui, Song, Qiu, Liang, CVPR 2022",
        object="residency.compress.divergences:DKD",
        step="distill: {loss: dkd}",
        pain="My teacher is so sure of its answers that the student learns nothing about the alternatives",
    ),
    Method(
        name="nkd",
        stage="compress",
        role="Objective",
        title="From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        arxiv="2303.13005",
        reference="Yang, Zeng, Li et al., ICCV 2023",
        object="residency.compress.divergences:NKD",
        step="distill: {loss: nkd}",
        pain="The student cannot match the teacher's other classes because their sums differ",
    ),
    Method(
        name="normkd",
        stage="compress",
        role="Objective",
        title="NormKD: Normalized Logits for Knowledge Distillation",
        arxiv="2308.00520",
        reference="Chi, Zheng, Li et al., 2023",
        object="residency.compress.divergences:NormKD",
        step="distill: {loss: normkd}",
        pain="One temperature does not fit all samples",
    ),
    Method(
        name="adaptive-kl",
        stage="compress",
        role="Objective",
        title="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        arxiv="2404.02657",
        reference="Wu, Tao, Wang et al., COLING 2025",
        object="residency.compress.divergences:AdaptiveKL",
        step="distill: {loss: adaptive-kl}",
        pain="I have few epochs and do not know whether forward or reverse KL will get there",
    ),
    Method(
        name="top-kl",
        stage="compress",
        role="Objective",
        title="BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation",
        arxiv="2406.13555",
        reference="Li, Zhou, Song, COLING 2025 (its baseline: KL on the teacher's top k)",
        object="residency.compress.divergences:TopKL",
        step="distill: {loss: top-kl}",
        pain="The tail of the teacher's distribution is noise, and I want KL without it",
    ),
    Method(
        name="uld",
        stage="compress",
        role="Objective",
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        arxiv="2402.12030",
        reference="Boizard, El Haddad, Hudelot, Colombo, TMLR 2025",
        object="residency.compress.uld:ULD",
        step="distill: {loss: uld}",
        pain="My teacher and my student have different tokenizers",
    ),
    Method(
        name="depth-pruning",
        stage="compress",
        role="Surgery",
        title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arxiv="2403.03853",
        reference="Men, Xu, Zhang et al., 2024 (block influence); greedy removal by loss is our choice",
        object="residency.compress.layers:keep_layers",
        step="distill: {student: {layers: 20}}",
        pain="The model has more layers than my task needs",
    ),
    Method(
        name="width-pruning",
        stage="compress",
        role="Surgery",
        title="Compact Language Models via Pruning and Knowledge Distillation",
        arxiv="2407.14679",
        reference="Muralidharan, Turuvekere Sreenivas, Joshi et al., NeurIPS 2024 (Minitron)",
        object="residency.compress.width:narrow",
        step="distill: {student: {hidden: 384, heads: 6, ffn: 1024}}",
        pain="I want a narrower model, not only a shallower one",
    ),
    Method(
        name="merge-heads",
        stage="compress",
        role="Surgery",
        title="Align Attention Heads Before Merging Them: An Effective Way for Converting MHA to GQA",
        arxiv="2412.20677",
        reference="Jin, Song, Zhou, Qin, Findings of EMNLP 2025; merging by least squares is our choice",
        object="residency.compress.mergeheads:merge_heads",
        step="merge-heads: {kv-heads: 1}",
        pain="The KV cache is too large for my contexts or my users",
    ),
    Method(
        name="prosparse",
        stage="compress",
        role="Surgery",
        title="ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models",
        arxiv="2402.13516",
        reference="Song, Han, Zhang et al., COLING 2025",
        object="residency.compress.prosparse:ProSparse",
        step="sparsify: {max-steps: 200}",
        pain="Decoding one token reads every weight of the feed-forward layers",
    ),
    Method(
        name="clover-2",
        stage="infer",
        role="Decoder",
        title="Clover-2: Accurate Inference for Regressive Lightweight Speculative Decoding",
        arxiv="2408.00264",
        reference="Xiao, Gui, Su, Chen, 2024",
        object="residency.infer.clover:Clover2",
        step="draft: {method: clover-2}",
        pain="Answers come one token at a time, and each costs a pass over all weights",
    ),
    Method(
        name="clover",
        stage="infer",
        role="Decoder",
        title="Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge",
        arxiv="2405.00263",
        reference="Xiao, Shi, Nie et al., 2024",
        object="residency.infer.clover:Clover",
        step="draft: {method: clover}",
        pain="Medusa's later guesses do not know its earlier ones",
    ),
    Method(
        name="medusa",
        stage="infer",
        role="Decoder",
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        arxiv="2401.10774",
        reference="Cai, Li, Geng et al., ICML 2024",
        object="residency.infer.medusa:Medusa",
        step="draft: {method: medusa}",
        pain="I want the simplest trained draft there is",
    ),
    Method(
        name="prompt-lookup",
        stage="infer",
        role="Decoder",
        title="Prompt Lookup Decoding",
        arxiv=None,
        reference="Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding",
        object="residency.infer.lookup:PromptLookup",
        step="in Python: generate(custom_generate=Drafted(PromptLookup()))",
        pain="My answers quote their prompt, and I do not want to train a draft",
    ),
    Method(
        name="citrus",
        stage="infer",
        role="Decoder",
        title="CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling",
        arxiv="2406.12018",
        reference="Bai, Zou, Huang et al., EMNLP 2024",
        object="residency.infer.citrus:Citrus",
        step="cache: {method: citrus}",
        pain="My prompts are long documents, and their keys and values do not fit into memory",
    ),
    Method(
        name="streaming-llm",
        stage="infer",
        role="Decoder",
        title="Efficient Streaming Language Models with Attention Sinks",
        arxiv="2309.17453",
        reference="Xiao, Tian, Chen, Han, Lewis, ICLR 2024",
        object="residency.infer.eviction:Streaming",
        step="cache: {method: streaming}",
        pain="I want to generate without end in constant memory",
    ),
    Method(
        name="h2o",
        stage="infer",
        role="Decoder",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        arxiv="2306.14048",
        reference="Zhang, Sheng, Zhou et al., NeurIPS 2023",
        object="residency.infer.eviction:H2O",
        step="cache: {method: h2o}",
        pain="Exact strings such as numbers must survive in a small cache",
    ),
    Method(
        name="tova",
        stage="infer",
        role="Decoder",
        title="Transformers are Multi-State RNNs",
        arxiv="2401.06104",
        reference="Oren, Hassid, Yarden, Adi, Schwartz, EMNLP 2024",
        object="residency.infer.eviction:TOVA",
        step="cache: {method: tova}",
        pain="I want the simplest attention-based eviction as a baseline",
    ),
    Method(
        name="snapkv",
        stage="infer",
        role="Decoder",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        arxiv="2404.14469",
        reference="Li, Huang, Yang et al., NeurIPS 2024",
        object="residency.infer.eviction:SnapKV",
        step="cache: {method: snapkv}",
        pain="The prompt fits into memory once, but decoding behind it is slow",
    ),
    Method(
        name="attention-sinks",
        stage="evaluate",
        role="Diagnostic",
        title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
        arxiv="2410.13835",
        reference="Guo, Pai, Bai, Jiao, Jordan, Mei, NeurIPS 2024 workshop M3L",
        object="residency.evaluate.sinks:SinkProbe",
        step="sinks: {rows: 16}",
        pain="My cache eviction or my int8 activations break the model and I do not see why",
    ),
    Method(
        name="choice-accuracy",
        stage="evaluate",
        role="Metric",
        title="Surface Form Competition: Why the Highest Probability Answer Isn't Always Right",
        arxiv="2104.08315",
        reference="Holtzman, West, Shwartz et al., EMNLP 2021 (domain-conditional PMI)",
        object="residency.evaluate.choice:ChoiceAccuracy",
        step="task: {metric: choice-accuracy}",
        pain="Accuracy by plain likelihood rewards short, generic answers",
    ),
    Method(
        name="bits-per-byte",
        stage="evaluate",
        role="Metric",
        title="The Pile: An 800GB Dataset of Diverse Text for Language Modeling",
        arxiv="2101.00027",
        reference="Gao, Biderman, Black et al., 2020 (section 3.1)",
        object="residency.evaluate.bits_per_byte:BitsPerByte",
        step="task: {metric: bits-per-byte}",
        pain="Perplexities of two tokenizers cannot be compared",
    ),
    Method(
        name="exact-match",
        stage="evaluate",
        role="Metric",
        title="SQuAD: 100,000+ Questions for Machine Comprehension of Text",
        arxiv="1606.05250",
        reference="Rajpurkar, Zhang, Lopyrev, Liang, EMNLP 2016 (normalised exact match)",
        object="residency.evaluate.exact_match:ExactMatch",
        step="task: {metric: exact-match}",
        pain="My answers are short and have one right form",
    ),
    Method(
        name="rouge-l",
        stage="evaluate",
        role="Metric",
        title="ROUGE: A Package for Automatic Evaluation of Summaries",
        arxiv=None,
        reference="Lin, ACL Workshop 2004 (W04-1013)",
        object="residency.evaluate.rouge_l:RougeL",
        step="task: {metric: rouge-l}",
        pain="My answers are free text with a reference",
    ),
    Method(
        name="macro-f1",
        stage="evaluate",
        role="Metric",
        title="A comparison of event models for naive Bayes text classification; RCV1",
        arxiv=None,
        reference="Lewis, Yang, Rose, Li, JMLR 2004 (macro-averaged F1)",
        object="residency.evaluate.macro_f1:MacroF1",
        step="task: {metric: macro-f1}",
        pain="Rare classes count as much as common ones",
    ),
    Method(
        name="multilabel-f1",
        stage="evaluate",
        role="Metric",
        title="RCV1: A New Benchmark Collection for Text Categorization Research",
        arxiv=None,
        reference="Lewis, Yang, Rose, Li, JMLR 2004 (macro-averaged F1 of label sets)",
        object="residency.evaluate.multilabel_f1:MultilabelF1",
        step="task: {metric: multilabel-f1}",
        pain="My rows have several labels, and the rare ones count as much",
    ),
    Method(
        name="pearson",
        stage="evaluate",
        role="Metric",
        title="SemEval-2017 Task 1: Semantic Textual Similarity Multilingual and Crosslingual Focused Evaluation",
        arxiv="1708.00055",
        reference="Cer, Diab, Agirre et al., 2017 (Pearson correlation)",
        object="residency.evaluate.pearson:Pearson",
        step="task: {metric: pearson}",
        pain="My labels are numbers",
    ),
)

STEPS: tuple[StepRow, ...] = (
    StepRow(
        "curate", "residency.curate.steps:CurateByKShot", "by", "k-shot", "let the trusted rows choose from a pool"
    ),
    StepRow("tune", "residency.adapt.steps:TuneLora", "method", "lora", "train a LoRA adapter and merge it"),
    StepRow(
        "tune", "residency.adapt.steps:TuneClassify", "method", "classify", "fine-tune an encoder under a new head"
    ),
    StepRow("tune", "residency.adapt.steps:TuneProbe", "method", "probe", "fit a head on a frozen encoder"),
    StepRow(
        "tune", "residency.adapt.step_spcl:TuneSPCL", "method", "spcl", "classes gather around prototypes, in texts"
    ),
    StepRow("tune", "residency.adapt.step_noisy:TuneFoPro", "method", "fopro", "few trusted rows lead many noisy ones"),
    StepRow(
        "tune", "residency.adapt.step_noisy:TuneCAPro", "method", "capro", "captions say which noisy rows to believe"
    ),
    StepRow(
        "tune",
        "residency.adapt.step_label_prompts:TuneLabelPrompts",
        "method",
        "label-prompts",
        "detect several labels per text from a few rows each",
    ),
    StepRow(
        "self-train",
        "residency.adapt.step_self_train:SelfTrain",
        summary="fit a classifier again on its own confident answers",
    ),
    StepRow(
        "distill", "residency.compress.step_distill:Distill", summary="train a smaller student on the current model"
    ),
    StepRow(
        "merge-heads",
        "residency.compress.step_merge_heads:MergeHeads",
        summary="share keys and values among attention heads",
    ),
    StepRow(
        "sparsify",
        "residency.compress.step_sparsify:Sparsify",
        summary="ReLU, a growing L1 penalty, then a threshold: mostly zeros",
    ),
    StepRow("draft", "residency.infer.step_draft:Draft", summary="train a drafter that guesses ahead of the model"),
    StepRow(
        "cache",
        "residency.infer.step_cache:Cache",
        summary="hold the keys and values of long prompts to a budget",
    ),
    StepRow(
        "sinks",
        "residency.evaluate.step_sinks:Sinks",
        summary="where attention rests, and what the first token is worth",
    ),
    StepRow("evaluate", "residency.evaluate.steps:Evaluate", summary="how the base and every model are examined"),
)

EXAM_STEP = "evaluate"
"""The step whose parameters say how every model of a run is examined."""

METRICS = tuple(m.name for m in METHODS if m.role == "Metric")


def load(target: str, extras: tuple[str, ...] = ()) -> Any:
    """Import `module:attribute`.

    Raises:
        MissingError: When the module needs a package that is not installed; the message names the extra.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "residency":
            raise
        extra = extras[0] if extras else "all"
        raise MissingError(
            f"{target} needs the package `{error.name}`, which is not installed",
            hint=f"pip install 'residency[{extra}]'",
        ) from None


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word most like a misspelt one, or None when nothing is alike."""
    lowered = {k.lower(): k for k in known}
    found = get_close_matches(str(word).lower().replace("_", "-"), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def method(name: str) -> Method:
    """The catalogue row of a method.

    Raises:
        ResidencyError: When there is none; the message names the nearest.
    """
    for row in METHODS:
        if row.name == name:
            return row
    guess = nearest(name, [m.name for m in METHODS])
    raise ResidencyError(
        f"no method is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""),
        hint="`residency methods` lists them all",
    )


def step_rows(name: str) -> list[StepRow]:
    """All rows of a step name, default first; empty when unknown."""
    return [row for row in STEPS if row.name == name]


def step_names() -> list[str]:
    """The known step names, each once, in catalogue order."""
    return list(dict.fromkeys(row.name for row in STEPS))
