"""SQL over an index's files."""

from collections.abc import Sequence

import pandas as pd

from activations.sites import layer_of
from sae.errors import UserError
from viewer.index.storage import DRIVERS, EXAMPLES, LATENTS, RELATED, TOKENS
from viewer.tables import IndexFolder

_TABLES = {"latents": LATENTS, "examples": EXAMPLES, "drivers": DRIVERS, "related": RELATED}


def query(statement: str, index: IndexFolder, sites: Sequence[str]) -> pd.DataFrame:
    """The answer to one SELECT over the files of these sites; see `Run.sql`.

    It reads the index and nothing else: no other file, no network, no writing. Raises UserError with
    DuckDB's own words when the statement is no SELECT or cannot be answered.
    """
    import duckdb  # late: only this needs it

    for site in sites:
        index.site(site)  # names what is torn
    root = index.root.resolve()
    with duckdb.connect(config={"autoinstall_known_extensions": False}) as connection:
        for name, file in _TABLES.items():
            parts = [
                f"select {_quoted(site)} as site, {layer_of(site)} as layer, * "
                f"from read_parquet({_quoted(str(root / site / file))})"
                for site in sites
            ]
            connection.execute(f"create view {name} as {' union all '.join(parts)}")
        connection.execute(f"create view tokens as from read_parquet({_quoted(str(root / TOKENS))})")
        labels = index.annotations.table().astype({"site": "string", "label": "string", "notes": "string"})
        connection.register("labels", labels)
        connection.execute(f"set allowed_directories = [{_quoted(str(root))}]")
        connection.execute("set enable_external_access = false")
        connection.execute("set lock_configuration = true")
        try:
            statements = connection.extract_statements(statement)
            if [s.type for s in statements] != [duckdb.StatementType.SELECT]:
                raise UserError(
                    "sql takes one SELECT",
                    f"{len(statements)} statements in {statement!r}",
                    "give just one SELECT",
                )
            return connection.execute(statements[0]).df()
        except duckdb.Error as error:
            tables = ", ".join((*_TABLES, "tokens", "labels"))
            raise UserError(
                "the statement must be one that DuckDB can answer", str(error), f"the tables are {tables}"
            ) from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
