"""Training on the rows: the methods and recipe steps of the stage `adapt`."""

from __future__ import annotations

from residency.catalog.rows import Method, StepRow

METHODS: tuple[Method, ...] = (
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
)

STEPS: tuple[StepRow, ...] = (
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
)
