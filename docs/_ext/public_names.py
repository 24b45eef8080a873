"""Objects are documented where users import them from; links from the source's pages go by other names as well.

Gives each entry an anchor for every package that it can be reached by, and lets references use any of them.
"""

import importlib

from sphinx import addnodes

import singd


def paths(module, name):
    """``singd.X``, ``singd.layers.X``, ``singd.layers.base.X`` for an object that is defined in the last one."""
    top = getattr(importlib.import_module(module), name.split(".")[0])
    parts = getattr(top, "__module__", module).split(".")
    return {".".join([*parts[:i], name]) for i in range(1, len(parts) + 1)}


def add_anchors(app, doctree):
    for signature in doctree.findall(addnodes.desc_signature):
        module, name = signature.get("module"), signature.get("fullname")
        if module and module.startswith("singd") and name:
            signature["ids"] += sorted(paths(module, name) - set(signature["ids"]))


def resolve(app, env, node, contnode):
    target = node.get("reftarget", "")
    for public in singd.__all__:
        home = getattr(getattr(singd, public), "__module__", "singd")  # a constant has none
        prefix = f"{home}.{public}"
        if node.get("refdomain") == "py" and (target + ".").startswith(prefix + "."):
            name = "singd." + public + target[len(prefix) :]
            python = env.get_domain("py")
            return python.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
            )
    return None


def setup(app):
    app.connect("doctree-read", add_anchors)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
