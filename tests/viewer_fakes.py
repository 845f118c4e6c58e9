"""A tiny model, its dictionaries and a run folder, for the tests of the index and the viewer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from sae import DictionaryConfig, JumpReLU, save
from train.run_folder import RunFolder
from viewer.index.build import build_index

D_MODEL, D_VOCAB, D_SAE, CONTEXT = 16, 300, 24, 20
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
HOSTILE = (
    '<script>window.pwned=1</script>',
    '<img src=x onerror="window.pwned=1">',
    "\u202ereversed",
    "\x00nul",
    '"><svg onload=window.pwned=1>',
    "</span></p></div><b>out",
    "[link](javascript:window.pwned=1)",
    "$x$ **bold** `code`",
    "long" * 2500,
    " \n",
    "\x1b[31mred",
    "🙂",
)  # fmt: skip


class FakeModel:
    """Activations are a table lookup in whole eighths, so that sums come out the same in any order."""

    name = "fake"

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = {s: _eighths((D_VOCAB, D_MODEL), generator) for s in (*SITES, "blocks.1.attn.hook_z")}
        self.where = {s: _eighths((64, D_MODEL), generator) for s in self.table}
        self.gamma = 1 + torch.rand(D_MODEL, generator=generator)
        self._unembed = torch.randn(D_MODEL, D_VOCAB, generator=generator)
        self.forwards = 0

    @property
    def W_U(self) -> Tensor:
        return self._unembed

    def final_norm(self, resid: Tensor) -> Tensor:
        return resid / (resid.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.gamma

    def activations(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        self.forwards += 1
        return {s: self.table[s][tokens.long()] + self.where[s][: tokens.shape[1]] for s in sites}

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return [HOSTILE[i] if i < len(HOSTILE) else f" word{i}" for i in ids]


def fake_dictionary(site: str, *, seed: int = 0, threshold: float = 3.0, site_out: str = "") -> JumpReLU:
    cfg = DictionaryConfig(
        d_in=D_MODEL, d_sae=D_SAE, site_in=site, site_out=site_out, model="fake", corpus="made up"
    )
    dictionary = JumpReLU(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        dictionary.W_enc.copy_(_eighths((D_MODEL, D_SAE), generator))
        dictionary.W_dec.copy_(torch.randn(D_SAE, D_MODEL, generator=generator))
        dictionary.threshold.fill_(threshold)
        # one latent that always fires, one that never does
        dictionary.b_enc[1] = 64.0
        dictionary.threshold[2] = 1e6
    return dictionary.requires_grad_(False)


def fake_blocks(batches: int = 5, *, blocks: int = 3, seed: int = 0) -> list[TokenBlocks]:
    """Documents of 7 to 33 tokens behind BOS, cut by blocks and batches, some with a special token inside."""
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.full((batches * blocks * CONTEXT,), -1, dtype=torch.int32) for _ in range(3)]
    tokens, document, position = fields
    tokens.fill_(0)
    place, number = 0, 0
    while place < len(tokens):
        for index in range(int(torch.randint(7, 34, (1,), generator=generator))):
            if place % CONTEXT == 0 or index == 0:
                place += 1
            if place >= len(tokens):
                break
            drawn = int(torch.randint(1, D_VOCAB, (1,), generator=generator))
            tokens[place] = drawn % len(HOSTILE) if drawn < 60 else drawn
            document[place], position[place] = 100 - number % 40, index + 40 * (number // 40)
            if tokens[place] % 29 == 0:
                position[place] = -1
            place += 1
        number += 1
    shape = (batches, blocks, CONTEXT)
    tokens, document, position = (field.view(shape) for field in fields)
    return [
        TokenBlocks(tokens=t, document=d, position=p, keep=p >= 0)
        for t, d, p in zip(tokens, document, position, strict=True)
    ]


def fake_run(path: Path, *, index: bool = True, evaluated: bool = True, threshold: float = 3.0) -> RunFolder:
    config = {"model": "fake", "corpus": "made <i>up</i>", "width": D_SAE, "l0": 5.0, "tokens": 123_456}
    run = RunFolder.create(path, config, sites=list(SITES), device="cpu")
    dictionaries = {site: fake_dictionary(site, seed=n, threshold=threshold) for n, site in enumerate(SITES)}
    if threshold > 1000:
        for dictionary in dictionaries.values():
            dictionary.b_enc.zero_()
    for site, dictionary in dictionaries.items():
        save(dictionary, run.site_dir(site))
    names = ("l0", "fvu", "loss", "dead", "lr")
    run.log([{"step": t, "site": s, **dict.fromkeys(names, 1.0 / (t + 1))} for t in range(5) for s in SITES])
    if evaluated:
        row = {
            "l0": 5.2,
            "l0_target": 5.0,
            "fvu": 0.1,
            "delta_ce": 0.3,
            "delta_ce_se": 0.01,
            "kl": 0.2,
            "dead": 0.04,
        }
        run.write_eval({site: {**row, "ce_recovered_mean": 0.9, "ce_recovered_zero": 0.98} for site in SITES})
    if index:
        build_index(
            FakeModel(),
            dictionaries,
            lambda start: fake_blocks(),
            run.index_root,
            text={"corpus": "made up"},
            examples=6,
        )
    run.set_state("done")
    return run


def _eighths(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-8, 9, shape, generator=generator) / 8
