"""A site's feature index as the JSON batches that Neuronpedia's importer reads.

    batch-0.json, batch-1.json, ...    128 features each: model_id, layer, sae_set, sae_id_suffix, features

Every key that the importer asks for is there; correlated neurons and the allocation by head, which an index
does not know, are empty lists. What differs in meaning from other tools' files: logits are those of
`lens.top_logits` (through the final norm, centred over the vocabulary), and correlated features are those
correlated by when they fire, not by how much.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from activations.sites import kind_of, layer_of
from sae.files import atomic_write, make_folder
from viewer.index import storage

FEATURES_PER_FILE = 128
_BINS = 50
# tokens either side of a peak
_CONTEXT = 32
_DECIMALS = 5


def write_neuronpedia(
    index: Path,
    out: Path | str,
    *,
    vectors: Float[np.ndarray, "latent d_out"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes the index of a site as batches into a folder; returns the names of the files.

    With `vectors`, the decoder rows, each feature carries its own, and can be steered with there. `progress`
    counts latents. Raises UserError when the index is torn or of another version, or the disk refuses.
    """
    site = _SiteIndex(index)
    manifest, out = site.manifest, make_folder(out)
    head = {
        "model_id": manifest["model"],
        "layer": layer_of(manifest["site_out"]),
        "sae_set": f"{kind_of(manifest['site_out'])}-{manifest['d_sae']}",
        "sae_id_suffix": None,
    }
    names = []
    for first in range(0, manifest["d_sae"], FEATURES_PER_FILE):
        last = min(first + FEATURES_PER_FILE, manifest["d_sae"])
        features = [site.feature(latent) for latent in range(first, last)]
        if vectors is not None:
            for feature in features:
                feature["vector"] = _rounded(vectors[feature["feature_index"]])
        names.append(f"batch-{len(names)}.json")
        text = json.dumps({**head, "features": features}, allow_nan=False, ensure_ascii=False)
        atomic_write(out / names[-1], text.encode())
        if progress:
            progress(last, manifest["d_sae"])
    return names


class _SiteIndex:
    """A site's index, read a latent at a time in the order of the latents."""

    def __init__(self, folder: Path) -> None:
        self.manifest = storage.read_manifest(folder)
        self._firings, self._texts = storage.read_firings(folder), storage.read_texts(folder.parent)
        self._strings = storage.read_tokens(folder.parent)
        self._latents = storage.read_rows(folder / storage.LATENTS).combine_chunks()
        self._examples = storage.read_rows(folder / storage.EXAMPLES).combine_chunks()
        latents = np.arange(len(self._firings) + 1)
        self._starts = np.searchsorted(self._examples["latent"].to_numpy(), latents)
        columns = ["latent", "kind", "other", "value", "count"]
        related = storage.read_rows(folder / storage.RELATED, columns=columns).to_pandas()
        self._cofiring = related[related["kind"] == "cofiring"]
        self._counts = np.diff(self._firings.starts)
        # the activation of the latent at hand on each row
        self._here = np.zeros(len(self._texts), np.float32)

    def feature(self, latent: int) -> dict[str, Any]:
        """All that Neuronpedia holds of a feature."""
        row = self._latents.slice(latent, 1).to_pylist()[0]
        manifest, (blocks, context) = self.manifest, self._texts.tokens.shape
        aligned = row["neuron_alignment"] or []
        sides = {
            f"{theirs}_{what}": values
            for theirs, ours in (("pos", "top"), ("neg", "bottom"))
            for what, values in (
                ("str", [self._strings[i] for i in row[f"{ours}_tokens"] or []]),
                ("values", _rounded(row[f"{ours}_logits"] or [])),
            )
        }
        return {
            "feature_index": latent,
            "neuron_alignment_indices": [entry["neuron"] for entry in aligned],
            "neuron_alignment_values": _rounded([entry["value"] for entry in aligned]),
            "neuron_alignment_l1": _rounded([entry["share"] for entry in aligned]),
            "correlated_neurons_indices": [],
            "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [],
            **self._correlated(latent),
            **sides,
            "frac_nonzero": row["density"],
            **self._histograms(latent, row),
            "n_prompts_total": blocks,
            "n_tokens_in_prompt": context,
            "dataset": manifest["corpus"],
            "decoder_weights_dist": [],
            "activations": list(self._activations(latent, row)),
        }

    def _correlated(self, latent: int) -> dict[str, list[Any]]:
        """Latents of this site that fire on the same tokens: Pearson's r and cosine of firing or not."""
        order = self._cofiring["latent"].searchsorted([latent, latent + 1])
        with_it = self._cofiring.iloc[order[0] : order[1]]
        others = with_it["other"].to_numpy()
        both = with_it["count"].to_numpy(np.float64)
        cosine = both / np.sqrt(np.maximum(self._counts[latent] * self._counts[others], 1))
        return {
            "correlated_features_indices": others.tolist(),
            "correlated_features_l1": _rounded(cosine),
            "correlated_features_pearson": _rounded(with_it["value"]),
        }

    def _histograms(self, latent: int, row: dict[str, Any]) -> dict[str, list[Any]]:
        values = self._firings.latent(latent)[1]
        heights, edges = np.histogram(values, _BINS, (0, row["max"])) if len(values) else ([], np.zeros(1))
        logit_heights = row["logit_histogram"] or []
        logit_edges = np.array(self.manifest["logit_histogram_edges"] if logit_heights else [0.0])
        return {
            "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2),
            "freq_hist_data_bar_heights": np.asarray(heights, np.int64).tolist(),
            "logits_hist_data_bar_values": _rounded(
                (logit_edges[:-1] + logit_edges[1:]) / 2 * (row["logit_std"] or 0)
            ),
            "logits_hist_data_bar_heights": logit_heights,
        }

    def _activations(self, latent: int, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Its examples, highest first, then those of each band of its range."""
        rows, values = self._firings.latent(latent)
        self._here[rows] = values
        uppers = [row["max"], *(row["quantiles"] or [])]
        for example in self._of(latent):
            band = example["band"]
            # by their convention the top ones are of no interval
            low, high, share = -1.0, row["max"], -1.0
            if band > 0:
                high, low = uppers[band - 1], uppers[band]
                share = float(((values > low) & (values <= high)).mean())
            span = self._around(example["block"], example["peak"])
            places = self._texts.row_of[example["block"], span]
            shown = np.where(places >= 0, self._here[places], 0)
            tokens = self._texts.tokens[example["block"], span]
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": round(share, _DECIMALS),
                "qualifying_token_index": example["peak"] - span.start,
                "tokens": [self._strings[i] for i in tokens.tolist()],
                "values": _rounded(shown),
            }
        self._here[rows] = 0

    def _of(self, latent: int) -> list[dict[str, Any]]:
        """A latent's rows of examples.parquet."""
        first, last = self._starts[latent], self._starts[latent + 1]
        return self._examples.slice(first, last - first).to_pylist()

    def _around(self, block: int, peak: int) -> slice:
        """The tokens around a place that are of its document."""
        document = self._texts.document[block]
        first, last = max(0, peak - _CONTEXT), min(len(document), peak + _CONTEXT + 1)
        other = np.flatnonzero(document[first:last] != document[peak]) + first
        before, after = other[other < peak], other[other > peak]
        return slice(int(before[-1]) + 1 if len(before) else first, int(after[0]) if len(after) else last)


def _rounded(values: Any) -> list[float]:
    """As floats of a few decimals, which is what makes these files large."""
    return np.round(np.asarray(values, np.float64), _DECIMALS).tolist()
