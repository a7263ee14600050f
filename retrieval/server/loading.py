"""Open what a server serves: indexes, their models, class sets."""

from pathlib import Path

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.class_names import DEFAULT_TEMPLATES, read_class_names
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search.searcher import Searcher
from retrieval.server.config import ServeConfig
from retrieval.server.monitoring import Metrics
from retrieval.server.service import Service


def load_service(
    cfg: ServeConfig, model: LitModel | None = None, tell_load: bool = True
) -> Service:
    """Open everything that a server needs, and warm it up. model: where it is loaded already.
    tell_load: whether stderr is told where other programs disturb the times of patch sizes. Raises
    `UsageError`."""
    models: list[LitModel] = []
    searchers: dict[str, Searcher] = {}
    for name, folder in zip(cfg.index_names(), cfg.index, strict=True):
        searcher = Searcher.load(folder, model or cfg.model, cfg.device)
        for known in models:  # equal models are kept once, so that their requests share forwards
            fitted = _read_as(known, searcher.model)
            if _same(fitted, searcher.model):
                named = searcher.model_folder
                searcher = Searcher.load(folder, fitted, cfg.device)
                searcher.model_folder = named
        if searcher.model not in models:
            models.append(searcher.model)
        for size in searcher.encodable:  # measured now: the first request need not wait
            searcher.profile.gflops(size)
        searcher.profile.ms(searcher.encodable, tell_load)
        searcher.model.encode_text(["warm"])
        _ = searcher.calibration
        searchers[name] = searcher
    class_sets = {Path(file).stem: _load_classes(Path(file), models[0]) for file in cfg.classes}
    return Service(searchers, class_sets, cfg.limits, Metrics(), cfg.image_urls, cfg.refuse)


def _read_as(known: LitModel, other: LitModel) -> LitModel:
    """`known`, by the fit of `other` where it has that; weights are shared."""
    fit = other.transform.fit
    return known if fit == "aspect" and not known.vision.flexible else with_fit(known, fit)


def _same(one: LitModel, other: LitModel) -> bool:
    return (one.image_fingerprint, one.text_fingerprint) == (
        other.image_fingerprint,
        other.text_fingerprint,
    )


def _load_classes(file: Path, model: LitModel) -> ZeroShotClassifier:
    if file.is_dir():
        return ZeroShotClassifier.load(file, model)
    return ZeroShotClassifier(model, read_class_names(file), DEFAULT_TEMPLATES)
