#!/usr/bin/env python
"""Train, resume or evaluate with fast-reid and the plugin.

    python tools/train_net.py --config-file projects/QSD/market.yml [KEY VALUE ...]

A config with a recipe (``RECIPE.NAME``) runs stage by stage; what has finished is skipped, what was cut off is resumed.
Any other config trains as fast-reid's own ``tools/train_net.py`` does. Either ends with OUTPUT_DIR/deploy, the network
for use without the plugin.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qsd_plugin.core.distributed import on_main, rank
from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.core.files import check_writable
from qsd_plugin.core.stages import run_recipe


def main() -> None:
    """Entry point; plugin errors end the process with one paragraph and exit code 2."""
    try:
        from qsd_plugin.hosts import fastreid as host

        host.activate()
        from fastreid.engine import launch

        arguments = parse_arguments()
        launch(
            run,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except QSDPluginError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    """The host's options, and those of recipes."""
    from fastreid.engine import default_argument_parser

    parser: argparse.ArgumentParser = default_argument_parser()
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage", metavar="NAME", help="run this stage of the recipe only")
    parser.add_argument("--from-stage", metavar="NAME", help="run this stage and all later ones again")
    parser.add_argument(
        "--accept-stale", action="store_true", help="keep finished stages although their settings have changed"
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> Any:
    """What one process does: evaluate, run the recipe, or train this config."""
    from qsd_plugin.hosts.fastreid import recipes, training_stages

    cfg = load_config(arguments)
    check_writable(Path(cfg.OUTPUT_DIR))
    if arguments.eval_only:
        return training_stages.evaluate(cfg, arguments)
    if not cfg.RECIPE.NAME:
        return training_stages.train_and_deploy(cfg, arguments, resume=arguments.resume)
    return run_recipe(
        recipes.build_recipe(cfg, arguments),
        Path(cfg.OUTPUT_DIR),
        only=arguments.stage,
        from_stage=arguments.from_stage,
        accept_stale=arguments.accept_stale,
        announce=(lambda line: print(f"[qsd_plugin] {line}", flush=True)) if rank() == 0 else (lambda line: None),
        on_main=on_main,
    )


def load_config(arguments: argparse.Namespace) -> Any:
    """The frozen config of the command line."""
    from fastreid.config import get_cfg

    cfg = get_cfg()
    if not Path(arguments.config_file).is_file():
        from qsd_plugin.model_zoo import list_configs

        raise ConfigError(
            "--config-file",
            value=arguments.config_file,
            expected="an existing YAML file",
            remedy=f"Shipped configs, below projects/: {', '.join(list_configs())}.",
        )
    cfg.merge_from_file(arguments.config_file)
    cfg.merge_from_list(arguments.opts)
    cfg.freeze()
    return cfg


if __name__ == "__main__":
    main()
