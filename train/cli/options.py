"""What the verbs are told, apart from training (train/config.py): dataclasses whose fields are the flags."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from sae.errors import UserError
from train.config import Count, Size, TrainConfig, Width

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
RunPath = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure a run's dictionaries on documents that training never saw; writes eval.json into the run.

    L0, FVU and dead latents come from the model's body alone. The losses (delta CE, CE recovered, KL) put
    each dictionary's reconstruction into the model, and take most of the time.
    """

    run: RunPath
    """The run folder."""
    tokens: Count = 16_384
    """Held-out tokens for L0, FVU and dead latents."""
    loss_tokens: Count = 2_048
    """Tokens, of these, for the loss with each dictionary in the model."""
    baseline_tokens: Count = 240
    """Tokens, of these, for mean and zero ablation, whose losses are so large that few are enough."""
    corpus: str = ""
    """Other text to measure on; its held-out tenth is used. Empty: the run's own corpus."""
    layers: str = "all"
    """Layers of the run to measure: all, 9, 3-8, ::2. Metrics of the others are kept as they are."""
    dtype: Dtype = "auto"
    """The model's dtype. auto: as in training."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        _above_zero(self, "tokens", "loss_tokens", "baseline_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Collect what makes each latent fire on held-out text, for the viewer and for notebooks.

    One pass over the text serves all layers and keeps every firing. For each latent: how often it fires, a
    histogram of its activations, examples with their context, the tokens that drive it, what fires with it,
    and the tokens it speaks for and against. Takes a run, or dictionaries of any format that `jumpscope
    import` reads, each at a site of its own. The same command goes on with an index that was cut off.
    """

    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN | DICTIONARY [DICTIONARY ...]")
    ]
    """A run folder, or folders, files or ids of dictionaries."""
    tokens: Count = 50_000
    """Held-out tokens to read. More find better examples of rare latents."""
    examples: Count = 20
    """Examples to keep of the highest activations of each latent, at most one a document and block."""
    corpus: str = ""
    """Text to read; its held-out tenth is used. Empty: the run's own corpus; for dictionaries, wiki-leads."""
    layers: str = "all"
    """Layers to index: all, 9, 3-8, ::2."""
    model: str = ""
    """The language model of dictionaries whose files do not say it in words that `jumpscope models` knows."""
    context: Count = 0
    """Tokens in a block, BOS included. 0: as in training, and 256 where that is unknown."""
    out: str = ""
    """The folder to write. Empty: index/ in the run, or in the folder of the one dictionary."""
    dtype: Dtype = "auto"
    """The model's dtype. auto: as in training."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        _above_zero(self, "tokens", "examples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """Write a model's activations to a folder, to train from as often as you like without running the model
    again.

    One forward pass serves all sites. Special tokens are left out. The store says in its manifest.json what
    its rows are; `jumpscope train --store DIR` reads it. The same command goes on with a store that was cut
    off, however that happened, and adds to a finished one when --tokens is larger.
    """

    model: str = "gemma-3-270m"
    """Language model: a name of `jumpscope models`, a hub id, a transformers folder or a .gguf file."""
    corpus: str = "wiki-leads"
    """Text: a name of `jumpscope corpora`, a file, or a `datasets` name."""
    sites: str = "resid_post"
    """Kinds of site, with commas: resid_post, resid_mid, resid_pre, mlp_out, attn_out, attn_z."""
    layers: str = "all"
    """Layers: all, 9, 3-8, ::2."""
    tokens: Count = 250_000
    """Tokens to harvest."""
    split: Literal["train", "held_out", "all"] = "train"
    """Which documents: those to train on, the held-out tenth, or all."""
    context: Count = 256
    """Tokens in a block, BOS included."""
    model_batch: Count = 8
    """Blocks in a forward pass."""
    seed: int = 0
    """Decides the documents' order."""
    dtype: Dtype = "auto"
    """The model's dtype. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    store_dtype: Literal["auto", "bfloat16", "float16", "int8"] = "auto"
    """The rows on disk. auto: the model's dtype. int8: half the size, rounded within each row."""
    out: str = "stores/harvest"
    """The store: a folder to create or go on with, or a URL that fsspec knows, such as s3://bucket/all."""

    def __post_init__(self) -> None:
        _above_zero(self, "tokens", "context", "model_batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Browse runs: an overview of the layers, search, a page for each feature. Ctrl-C ends it."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, after `jumpscope index`, or folders of an index alone."""
    port: int = 8501
    """Port of the viewer."""
    address: str = "127.0.0.1"
    """Where it listens. With 0.0.0.0 every machine that can reach this one can read and label your runs."""
    headless: bool = False
    """Serve without opening a browser."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("the viewer needs a run", "none", "name the folder of one, or of several")


# for a run of some hundred steps: larger ones, a shorter memory of squares, silent latents drawn back sooner
_SHORT_RECIPE = {"lr": 5e-3, "decay": 0.35, "beta2": 0.99, "bandwidth": 0.25, "pull_after": 10_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """A dictionary for every layer of a small model: plan, train, evaluate, index, and look.

    The model and the text come from installed packages; nothing is fetched. Everything lands in one run
    folder.
    """

    model: str = "gemma-3-270m"
    """Language model: a name of `jumpscope models`, a hub id, a transformers folder or a .gguf file."""
    corpus: str = "wiki-leads"
    """Text: a name of `jumpscope corpora`, a file, or a `datasets` name."""
    sites: str = "resid_post"
    """Kinds of site, with commas."""
    layers: str = "all"
    """Layers: all, 9, 3-8, ::2."""
    width: Width = 2048
    """Latents in each dictionary."""
    l0: float = 40.0
    """Target L0: latents firing on a token, on average."""
    tokens: Count = 90_000
    """Tokens to harvest; each trains every dictionary `passes` times."""
    passes: Count = 3
    """How often a harvested row is trained on before it leaves memory."""
    batch: Count = 512
    """Rows in a training step."""
    context: Count = 256
    """Tokens in a block, BOS included."""
    # all of them: with half as many, three quarters of layer 0's latents end up silent on held-out text
    buffer: Count = 90_112
    """Rows of the shuffle buffer: batches are drawn from so many rows at once."""
    memory: Size = 6 * 2**30
    """Memory that training may take, the model included. A run that needs more is refused."""
    seed: int = 0
    """Decides the documents' order, the batches and the first weights."""
    dtype: Dtype = "auto"
    """The model's dtype. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    held_out_tokens: Count = 16_384
    """Held-out tokens for L0, FVU, dead latents and the feature index."""
    # four blocks of the default context, special tokens out, where 1,024 would take a fifth
    loss_tokens: Count = 1_000
    """Tokens, of these, for the loss with each dictionary in the model."""
    out: str = ""
    """Run folder to create. Empty: runs/demo, which is opened again once it is finished."""
    view: bool = True
    """Open the viewer at the end."""
    headless: bool = False
    """Serve the viewer without opening a browser."""
    port: int = 8501
    """Port of the viewer."""

    def __post_init__(self) -> None:
        _above_zero(self, "held_out_tokens", "loss_tokens")
        self.train_config("unused")  # its own checks, before anything is done

    def train_config(self, out: str) -> TrainConfig:
        """The training that the demo does, into the folder `out`."""
        values: dict[str, Any] = shared_values(self, TrainConfig) | _SHORT_RECIPE | {"out": out}
        return TrainConfig(**values)


def shared_values(source: Any, kind: type) -> dict[str, Any]:
    """Values of the fields that a dataclass instance has in common with another dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Bring a dictionary from another library's format into ours, with everything folded in.

    Read are SAELens (old and new), Gemma Scope 1 and 2, dictionary_learning, sparsify and our own. What
    was folded or assumed is said. Nothing is unpickled but by torch's restricted reader.
    """

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID")]]
    """A folder, a weights file, ORG/REPO/FOLDER of the hub, or RELEASE:ID as SAELens writes it."""
    out: str
    """The folder to write."""
    site: str = ""
    """Where it reads, in TransformerLens's names, when its files do not say or are wrong."""
    site_out: str = ""
    """Where it writes, for a transcoder. Empty: what its files say, or `--site`."""
    model: str = ""
    """The language model, when its files do not say or are wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a dictionary in another library's format, with a model card; or what is known of its features.

    What the format cannot express is refused, never dropped. Two formats are of features, not of
    dictionaries, and are made from a feature index: `neuronpedia`, the batches that its importer reads, and
    `html`, a page for each latent and a table of them, which open without a server.
    """

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DICT")]]
    """The folder of a dictionary in any format that `jumpscope import` reads, or an id. For neuronpedia and
    html, RUN/sites/SITE, or a site's folder in an index; for html also a run: all of its sites."""
    to: Literal[
        "saelens", "gemma-scope", "gemma-scope-2", "dictionary-learning", "sparsify", "neuronpedia", "html"
    ]
    """The format."""
    out: str
    """The folder to write."""
    latents: str = ""
    """Latents to write, for html: 1,5,7-20. Empty: all."""

    def __post_init__(self) -> None:
        if self.latents and self.to != "html":
            raise UserError("--latents is for --to html", f"--to {self.to}", "leave it out")


def _above_zero(options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} must be at least 1", str(getattr(options, name)), "Give a positive number"
            )
