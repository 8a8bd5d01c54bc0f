"""Choosing rows under a budget: methods of the stage `curate`."""

from __future__ import annotations

from residency.catalog.rows import Method


def _row(name: str, title: str, arxiv: str | None, reference: str, target: str, pain: str) -> Method:
    return Method(
        name=name,
        stage="curate",
        role="Selector",
        title=title,
        arxiv=arxiv,
        reference=reference,
        object=f"residency.curate.{target}",
        step=f"curate: {{by: {name}}}",
        pain=pain,
    )


METHODS: tuple[Method, ...] = (
    _row(
        "k-shot",
        "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models",
        "2408.15915",
        "Yang, Qin, Wu et al., 2024 (its data step, Sim-Div)",
        "simdiv:SimDiv",
        "I have a few good rows and a large mixed pool",
    ),
    _row(
        "minhash",
        "On the resemblance and containment of documents",
        None,
        "Broder, SEQUENCES 1997",
        "minhash:MinHash",
        "The same text stands in my data many times, with small changes",
    ),
    _row(
        "top",
        "Unleashing the Power of Data Tsunami: A Comprehensive Survey on Data Assessment and Selection for "
        "Instruction Tuning of Language Models",
        "2408.02085",
        "Qin, Yang, Guo et al., TMLR 2024 (its top-k and percentile mechanisms)",
        "ranking:Top",
        "I have a score for every row and want the best ones",
    ),
    _row(
        "sample",
        "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling Sequences Without Replacement",
        "1903.06059",
        "Kool, van Hoof & Welling, ICML 2019",
        "ranking:Sample",
        "Taking only the best rows makes my data all alike",
    ),
    _row(
        "random",
        "Rethinking Data Selection at Scale: Random Selection is Almost All You Need",
        "2410.09335",
        "Xia, Yu, Dang et al., 2024",
        "ranking:Random",
        "Is my selection better than chance?",
    ),
    _row(
        "k-centre",
        "Active Learning for Convolutional Neural Networks: A Core-Set Approach",
        "1708.00489",
        "Sener & Savarese, ICLR 2018 (the greedy rule: Gonzalez, 1985)",
        "kcentre:KCentre",
        "No kind of row may be missing from a small subset",
    ),
    _row(
        "herding",
        "Herding Dynamical Weights to Learn",
        None,
        "Welling, ICML 2009",
        "herding:Herding",
        "A small subset must look, on average, like the whole",
    ),
    _row(
        "facility-location",
        "Lazier Than Lazy Greedy",
        "1409.7938",
        "Mirzasoleiman, Badanidiyuru, Karbasi, Vondrák & Krause, AAAI 2015 (lazy greedy: Minoux, 1978)",
        "facility:FacilityLocation",
        "Every row of a large pool should have a near relative in my subset",
    ),
    _row(
        "qdit",
        "Data Diversity Matters for Robust Instruction Tuning",
        "2311.14736",
        "Bukharin, Li, Wang et al., Findings of EMNLP 2024",
        "facility:QDIT",
        "I want rows that are good and cover everything, and to say how much of each",
    ),
    _row(
        "dpp",
        "Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity",
        "1709.05135",
        "Chen, Zhang & Zhou, NeurIPS 2018",
        "dpp:DPP",
        "I want a small set of good rows of which no two say the same",
    ),
    _row(
        "semdedup",
        "SemDeDup: Data-efficient learning at web-scale through semantic deduplication",
        "2303.09540",
        "Abbas, Tirumala, Simig, Ganguli & Morcos, 2023",
        "semdedup:SemDeDup",
        "Rows say the same in other words",
    ),
    _row(
        "d4",
        "D4: Improving LLM Pretraining via Document De-Duplication and Diversification",
        "2308.12284",
        "Tirumala, Simig, Aghajanyan & Morcos, NeurIPS 2023",
        "semdedup:D4",
        "Much of my data is the same ordinary thing over and over",
    ),
    _row(
        "cluster-clip",
        "Balanced Data Sampling for Language Model Training with Clustering",
        "2402.14526",
        "Shao, Li, Fei, Yan, Lin & Qiu, Findings of ACL 2024",
        "semdedup:ClusterClip",
        "A few subjects fill most of my data",
    ),
    _row(
        "deita",
        "What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction Tuning",
        "2312.15685",
        "Liu, Zeng, He, Jiang & He, ICLR 2024",
        "deita:Deita",
        "The best rows by score are nearly the same row",
    ),
    _row(
        "quotas",
        "The Flan Collection: Designing Data and Methods for Effective Instruction Tuning",
        "2301.13688",
        "Longpre, Hou, Vu et al., ICML 2023 (mixtures by task)",
        "quotas:Quotas",
        "I want so many rows of each kind",
    ),
    _row(
        "instag",
        "#InsTag: Instruction Tagging for Analyzing Supervised Fine-tuning of Large Language Models",
        "2308.07074",
        "Lu, Yuan, Yuan et al., ICLR 2024",
        "instag:InsTag",
        "I want complex instructions of every kind",
    ),
)
