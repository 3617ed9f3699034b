"""`vptq doctor`: what is missing or wrong, and what to type."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from vptq.cli.console import check_json_file, output, write_json_file

if TYPE_CHECKING:
    from vptq.doctor import Finding

COLORS = {"ok": "green", "optional": "yellow", "problem": "bold red"}
INDENT = 30


def doctor(
    hub: Annotated[
        bool, typer.Option("--hub", help="Ask the Hugging Face hub too: does it answer, does it accept the token?")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file as well.")] = None,
) -> None:
    """Find what is missing or wrong, and what to type.

    Exit status 1 where something is wrong. What is optional may be absent.
    """
    check_json_file(json_file)
    console = output()
    findings = []
    with console.status("looking"):
        from vptq.doctor import examine

        for finding in examine(reach_hub=hub):
            findings.append(finding)
            console.print(_line(finding), soft_wrap=True)
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}")
    if json_file is not None:
        write_json_file({"problems": problems, "findings": [asdict(finding) for finding in findings]}, json_file)
    if problems:
        raise typer.Exit(1)


def _line(finding: Finding) -> Text:
    line = Text.assemble(
        (f"{finding.state:9} ", COLORS[finding.state]), (f"{finding.part:{INDENT - 10}}", "bold"), finding.found
    )
    return line.append(f"\n{'':{INDENT}}$ {finding.remedy}" if finding.remedy else "")
