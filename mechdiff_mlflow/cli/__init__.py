"""The command line: every command reads options, calls one function and prints what it found."""

from mechdiff_mlflow.cli import (
    exchange,
    experiments,
    models,
    pairs,
    recovery,
    reports,
    servers,
    using,
    winners,
)
from mechdiff_mlflow.cli.group import cli, main

cli.add_command(experiments.run_command)
cli.add_command(experiments.fit_command)
cli.add_command(experiments.patch_command)
cli.add_command(experiments.sweep_command)
cli.add_command(experiments.report_pass_command)
cli.add_command(models.atlas_command)
cli.add_command(models.layers_command)
cli.add_command(models.heads_command)
cli.add_command(reports.report_command)
cli.add_command(reports.compare_command)
cli.add_command(reports.runs_command)
cli.add_command(recovery.resume_command)
cli.add_command(winners.promote_command)
cli.add_command(winners.fetch_command)
cli.add_command(winners.maps_command)
cli.add_command(using.steer_command)
cli.add_command(using.adapter_command)
cli.add_command(exchange.import_command)
cli.add_command(exchange.export_command)
cli.add_command(pairs.doctor_command)
cli.add_command(servers.server_check_command)

__all__ = ["cli", "main"]
