"""Telling the catalogue what was found: that data files of a checkpoint are lost, or are all there again."""

from __future__ import annotations

from shardbook._lost import is_within_reach
from shardbook.client import Client
from shardbook.verifying.report import VerifyReport


def flag(report: VerifyReport, client: Client) -> bool | None:
    """Sets or clears the flag ``data_missing`` of a checkpoint of the catalogue, by what was found of its files.

    Lost and cut files set it; a report of all ranks without any fault clears it. Nothing is told where the storage is
    out of reach from here, and the checkpoint therefore seems lost; or where one of its places was not looked at.

    Returns:
        What was told; None when nothing was: the report is about a directory or about some ranks, or the catalogue
        says the same already.

    Raises:
        ShardbookError: The catalogue could not be told.
    """
    if report.name is None or (report.is_missing and not _is_sure(report)):
        return None
    if not report.is_missing and (not report.is_ok or report.ranks is not None):
        return None
    if client.get_checkpoint(report.name).data_missing is report.is_missing:
        return None
    return client.report_missing_data(report.name, missing=report.is_missing).data_missing


def _is_sure(report: VerifyReport) -> bool:
    """True when the files of a checkpoint were looked for at all of its places."""
    return not report.unknown_locations and all(
        is_within_reach(one) for one in (report.directory, *report.faulty_directories)
    )


__all__ = ["flag"]
