"""Model families of this package, and adapters by which foreign repositories are patched.

`mdeq`, `transformer` and `ignn` are models. `repos` has one adapter per repository.
"""
