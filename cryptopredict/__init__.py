"Long-horizon Bitcoin forecasts that can be checked; `import cryptopredict as cp` loads a name's module when it is first used."
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .audits import audit_labels, audit_model, audit_pipeline, certificate
    from .baselines import ForecastModel
    from .config import ConfigError
    from .features import Feature, FeatureState, build_features
    from .hints import lint
    from .labels import make_labels
    from .leakage import (Fold, FoldSplit, LeakageError, LeakReport, asset_fold, audit, audit_availability, audit_folds,
                          live_fold, point_in_time, stack_assets, walk_forward)
    from .mamba2_block import Mamba2, Mamba2Block, Mamba2Config, Mamba2State
    from .mhsa import MHSA, MHSAConfig
    from .multitask import ModelConfig, MultitaskModel, preset
    from .network import Network
    from .protocol import EvaluateConfig, load_config
    from .results import Evaluation, evaluate, write_report
    from .run_audits import audit_inputs, audit_network
    from .simulate import simulate_market
    from .sources import inventory, load_panel, load_panels, read
    from .ssd import ssd_scan
    from .states import detach, load_state, save_state
    from .tbptt_trainer import TrainConfig, train, train_preset
    from .track import CallbackList, LiveLoss, MLflow, TensorBoard

NAMES = {  # module -> what it gives to the package
    "audits": "audit_labels audit_model audit_pipeline certificate",
    "baselines": "ForecastModel",
    "config": "ConfigError",
    "features": "Feature FeatureState build_features",
    "hints": "lint",
    "labels": "make_labels",
    "leakage": "Fold FoldSplit LeakageError LeakReport asset_fold audit audit_availability audit_folds live_fold point_in_time "
               "stack_assets walk_forward",
    "mamba2_block": "Mamba2 Mamba2Block Mamba2Config Mamba2State",
    "mhsa": "MHSA MHSAConfig",
    "multitask": "ModelConfig MultitaskModel preset",
    "network": "Network",
    "protocol": "EvaluateConfig load_config",
    "results": "Evaluation evaluate write_report",  # where the figures and the report are added
    "run_audits": "audit_inputs audit_network",
    "simulate": "simulate_market",
    "sources": "inventory load_panel load_panels read",
    "ssd": "ssd_scan",
    "states": "detach load_state save_state",
    "tbptt_trainer": "TrainConfig train train_preset",
    "track": "CallbackList LiveLoss MLflow TensorBoard",
}
MODULE_OF = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = [  # in full, for type checkers
    "__version__", "CallbackList", "ConfigError", "EvaluateConfig", "Evaluation", "Feature", "FeatureState", "Fold",
    "FoldSplit", "ForecastModel", "LeakReport", "LeakageError", "LiveLoss", "MHSA", "MHSAConfig", "MLflow", "Mamba2",
    "Mamba2Block", "Mamba2Config", "Mamba2State", "ModelConfig", "MultitaskModel", "Network", "TensorBoard",
    "TrainConfig", "asset_fold", "audit", "audit_availability", "audit_folds", "audit_inputs", "audit_labels", "audit_model",
    "audit_network", "audit_pipeline", "build_features", "certificate", "detach", "evaluate", "inventory", "lint",
    "live_fold", "load_config", "load_panel", "load_panels", "load_state", "make_labels", "point_in_time", "preset", "read",
    "save_state", "simulate_market", "ssd_scan", "stack_assets", "train", "train_preset", "walk_forward", "write_report",
]


def __getattr__(name: str) -> Any:
    "The name, from its module, which is loaded now (PEP 562)."
    if name not in MODULE_OF: raise AttributeError(f"module 'cryptopredict' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted(__all__)
