"""Training on many devices, built on ``torch.distributed``.

=================  ================================================================================================
``plan``           which processes do what: ``dp=2,fsdp=2,tp=2,pp=2``, checked against model and batch
``world``          the processes: their groups and meshes, one answer for all of them, whose fault a failure is
``shard``          a model on the processes of one stage: tensor and sequence parallel, FSDP2, DDP
``pipeline``       a model cut into stages, run by the schedules of ``torch.distributed.pipelining``
``engine``         the gradients of one step, whatever the plan
``shape``          dimensions of models that are priced and not built
``hardware``       rates of devices and links, measured or assumed
``cost``           seconds and bytes of a step by formula, and the best plan
``pieces``         boxes of tensors, as a process holds them and as files hold them
``checkpoint``     checkpoints that all write together, in the background, and that any number reads
=================  ================================================================================================
"""
