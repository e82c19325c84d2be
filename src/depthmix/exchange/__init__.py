"""Models in and out: a run as a folder that transformers loads, and such a folder as a run.

=================  =====================================================================================
``folder``         writes and reads the folder; needs no transformers
``tokenizer``      the run's tokenizer as a ``tokenizer.json``, and back
``card``           the model card with the run's numbers
``standalone``     one file of model code, gathered from this package's sources, for folders that load alone
``plain``          what that file has in place of kernels
=================  =====================================================================================
"""
