"""Choices by `name` that outside packages add sections to, through entry points.

A field `router: Annotated[RouterSection, OpenChoice(...)]` takes the sections of this package and
those that installed packages register. They are looked for when a config is first checked, not on
import, so a plug-in may import whatever it needs.
"""

from functools import cached_property, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from dmoe.config.base import ConfigError, ConfigModel, names_of


class OpenChoice:
    """Marks a field, in `Annotated`, as a choice among sections that plug-ins add to.

    Args:
        group: of the entry points.
        base: the class that every section extends.
        builtin: where the sections of this package are, as `module:NAME` of a tuple. It is read
            late, as one of these sections may hold the same choice.
    """

    def __init__(self, group: str, base: type[ConfigModel], builtin: str):
        self.group, self.base, self.builtin = group, base, builtin

    @cached_property
    def sections(self) -> tuple[type[ConfigModel], ...]:
        """The sections: those of this package, then those of plug-ins by name.

        Raises:
            ConfigError: a plug-in cannot be loaded, is no such section, or takes a name again.
        """
        sections = list(EntryPoint("builtin", self.builtin, self.group).load())
        owners = {name: "dmoe" for section in sections for name in names_of(section)}
        for point in sorted(entry_points(group=self.group)):
            package = point.dist.name if point.dist else point.value
            if point.name in owners:
                raise self._fault(point, f"{owners[point.name]} has that name already")
            owners[point.name] = package
            sections.append(self._load(point))
        return tuple(sections)

    def _load(self, point: EntryPoint) -> type[ConfigModel]:
        try:
            section = point.load()
        except Exception as error:  # whatever the import of foreign code raises
            raise self._fault(point, f"{type(error).__name__}: {error}") from error
        if not (isinstance(section, type) and issubclass(section, self.base)):
            raise self._fault(point, f"{point.value} is no {self.base.__name__}")
        if names_of(section) != (point.name,):
            raise self._fault(
                point, f'{point.value} must have the field name: Literal["{point.name}"]'
            )
        return section

    def _fault(self, point: EntryPoint, reason: str) -> ConfigError:
        package = point.dist.name if point.dist else "an unknown package"
        return ConfigError(
            f"the plug-in {point.name!r} of {package} (entry points {self.group}) cannot be used: "
            f"{reason}; repair that package or uninstall it"
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Stand for the union of the sections, told apart by `name`."""
        union: Any = reduce(or_, self.sections)
        return handler.generate_schema(Annotated[union, Field(discriminator="name")])
