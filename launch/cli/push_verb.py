"""The verb `push`: list what is uploaded and where to, ask, upload."""

from pathlib import Path

from ...models.common.errors import UserError
from ..report.tables import table_size
from ..terminal.fitting_table import fitting_table
from ..terminal.written import QuietEndConsole
from ..upkeep.push import plan_upload, upload, visibility
from .clean_verb import agreed


def run_push(folder: Path, hub_id: str, *, public: bool, yes: bool, message: str) -> None:
    """Upload a folder. A new repository is private, unless ``public``; one that exists keeps who may see it."""
    planned = plan_upload(folder, hub_id)
    seen = visibility(hub_id)
    # the hub would leave it as it is, and the option would mean nothing
    if seen == "private" and public:
        raise UserError(f"{hub_id} exists and is private; make it public on its page (Settings), or leave --public out")
    console = QuietEndConsole(markup=False, highlight=False)
    rows = [[name, table_size(size)] for name, size in planned.files.items()]
    console.print(fitting_table(f"{folder} -> {hub_id}", ("file", "size"), rows, console.width, text=("file",)))
    whose = f"the repository exists and is {seen}" if seen else f"a new {'public' if public else 'private'} repository"
    console.print(f"{len(planned.files)} files, {table_size(planned.bytes)}; {whose}", soft_wrap=True)
    for note in planned.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if planned.card is not None:
        console.print("note: the folder has no README.md; a short model card is uploaded", soft_wrap=True)
    if not (yes or agreed("upload them?", "--yes uploads without asking")):
        console.print("nothing was uploaded")
        return
    with console.status(f"uploading to {hub_id}"):
        address = upload(planned, private=not public, message=message)
    console.print(f"uploaded: {address}", soft_wrap=True)
