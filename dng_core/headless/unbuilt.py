"""A build backend that builds nothing.

pip asks a source distribution's backend for the metadata before it hands the archive over. This file then stands in
the place of setuptools: it answers with the metadata that lie in the archive, so nothing of the archive is run, and
nothing is downloaded to build it with.
"""

import email
import shutil
from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """Copy PKG-INFO of the archive, which is the current folder, into a new folder of metadata; returns its name."""
    described = email.message_from_string(Path("PKG-INFO").read_text(encoding="utf-8"))
    folder = Path(metadata_directory, f"{described['Name'].replace('-', '_')}-{described['Version']}.dist-info")
    folder.mkdir()
    shutil.copy("PKG-INFO", folder / "METADATA")
    return folder.name
