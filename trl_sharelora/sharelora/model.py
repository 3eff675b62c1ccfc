"""ShareLoraModel: injects the layers, connects the bank, loads with checks, generates with beams, merges one user."""

import copy
import functools
import os
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _get_in_out_features
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterMismatchError, ConfigError, RoutingError, UnknownUserError
from .bank import SlotBank, WorkingSet
from .config import PERSONAL_FACTOR, ShareLoraConfig
from .head import HEAD_MOVES, Float32Linear, PersonalHead, keep_in_float32
from .layer import Linear, ShareLoraLayer
from .routing import Route, Router
from .store import Layout, UserStore


# the critic of a policy, among `modules_to_save`: made here where the base has none
VALUE_HEAD = "value_head"
# as PEFT knows the heads of sequence classifiers
HEADS = ("score", "classifier")
# bank="auto": weights, gradients and two moments of all users as Parameters up to here, 16 bytes per weight; then records in
# memory up to this share of it. Above the first, a step's dense gradient and DDP's average of it begin to be felt.
RESIDENT_BYTES = 2 << 30
RAM_SHARE = 0.25


class ShareLoraModel(BaseTuner):
    """
    A model with ShareLoRA layers; made by [`~peft.get_peft_model`] from a [`ShareLoraConfig`].

    Its rows belong to users: open a route with [`use_users`], or pass `user_ids` to the forward or to `generate`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
        config ([`ShareLoraConfig`]):
            Of the first adapter; it must know its users.
        adapter_name (`str`):
            Its name.
    """

    prefix: str = "sharelora_"
    tuner_layer_cls = ShareLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._check_has_users(config)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight at the first evaluation for a kernel that has
                # no backward, and never unpacks it: training on would lose the gradient through the base without a word.
                # (The repacking also fails for sizes that are no multiples of its blocks.)
                module.support_avx512bf16_for_cpu = False
        if VALUE_HEAD in (config.modules_to_save or ()) and not hasattr(model, VALUE_HEAD):
            make_value_head(model)  # before PEFT looks for it: an adapter with a critic loads onto any base
        # before the layers, which refer to it
        self.router = Router(config.users)
        self._hooks = [
            model.register_forward_pre_hook(self.router.before_forward, with_kwargs=True),
            model.register_forward_hook(self.router.after_forward, always_call=True),
        ]

    def _prepare_model(self, peft_config: ShareLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.bank == "auto":
            peft_config.bank = self._bank_that_fits(peft_config, model)

    def _bank_that_fits(self, config: ShareLoraConfig, model: nn.Module) -> Literal["resident", "ram", "mmap"]:
        numel = 0
        for name, module in model.named_modules():
            if isinstance(module, ShareLoraLayer):
                continue
            if self._check_target_module_exists(config, name) and hasattr(module, "weight"):
                in_features, out_features = _get_in_out_features(module)
                if in_features and out_features:
                    sizes = {"B": in_features, "A": out_features, "AB": config.r, "diagonal": 1}
                    sizes["none"] = in_features + out_features
                    numel += config.r * sizes[config.share]
        if config.personal_head or config.init_users == "independent":
            return "resident"
        if 16 * numel * len(config.users) <= RESIDENT_BYTES:
            return "resident"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return "ram" if 12 * numel * len(config.users) <= RAM_SHARE * memory else "mmap"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        original = next((n for n, c in self.peft_config.items() if c is config and n != adapter_name), None)
        if original in self._working_sets():
            # TRL makes its reference adapter with the very config of the adapter it copies; each saves its own bank
            self.peft_config[adapter_name] = copy.copy(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].bank in ("ram", "mmap"):
            self._connect_bank(model, adapter_name, original)
        config = self.peft_config[adapter_name]
        personal = 0
        if str(config.task_type).endswith("SEQ_CLS"):
            for name, module in model.named_modules():
                if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                    keep_in_float32(module.modules_to_save[adapter_name])
                    if config.personal_head and name.rpartition(".")[2] in HEADS:
                        self._make_personal(module.modules_to_save[adapter_name], adapter_name)
                        personal += 1
        if config.personal_head and not personal:
            raise ConfigError(
                f"personal_head=True came with task_type={config.task_type!r} for a {type(model).__name__}, of which no head named "
                f"{' or '.join(HEADS)} is trained. Set task_type='SEQ_CLS' on a sequence classifier (the reward trainer does), or leave it out."
            )

    def _make_personal(self, head: nn.Module, adapter_name: str) -> None:
        linears = [part for part in head.modules() if isinstance(part, Float32Linear)]
        if not linears:
            raise ConfigError(
                f"personal_head=True, but the score head ({type(head).__name__}) has no plain linear module (it may be quantised). Keep the "
                "head out of the quantisation, or use personal_head=False."
            )
        if not isinstance(linears[-1], PersonalHead):  # the last one makes the reward
            PersonalHead.make_of(linears[-1], self.router, self.peft_config[adapter_name].train_common)

    def _working_sets(self) -> dict[str, WorkingSet]:
        """The working sets so far, by adapter; none before the first adapter is injected."""
        return self.router.working_sets if hasattr(self, "router") else {}

    def _connect_bank(self, model: nn.Module, adapter_name: str, original: str | None) -> None:
        """Give all modules of an adapter one working set, over a new store, the one that was saved, or a copy of another's."""
        config = self.peft_config[adapter_name]
        banks: dict[str, SlotBank] = {}
        for name, module in model.named_modules():
            if isinstance(module, ShareLoraLayer) and adapter_name in module.share:
                bank = module.bank(adapter_name)
                assert isinstance(bank, SlotBank)
                bank.number, banks[name] = len(banks), bank
        layout = Layout(
            tuple((name, bank.shape) for name, bank in banks.items()),
            config.bank_dtype,
            config.bank_second_moment,
            rank_axis=1 if config.share == "A" else 0,
        )
        if original is None:
            store = UserStore(
                layout, config.bank, config.users.registry_id, config.bank_dir, num_users=len(config.users)
            )
        else:
            self.router.working_sets[original].flush()
            store = self.router.working_sets[original].store.snapshot()
        working_set = WorkingSet(adapter_name, layout, store, config.bank_slots)
        if original is None and config.bank_source is not None:
            working_set.load(config.bank_source, len(config.users))
        for bank in banks.values():
            bank.working_set = working_set
        self.router.working_sets[adapter_name] = working_set
        config.save_bank = functools.partial(self.save_bank, adapter_name)

    def save_bank(self, adapter_name: str, directory: str) -> None:
        """Save the records of an adapter whose bank is in a store into `directory/bank`."""
        self.router.working_sets[adapter_name].save(directory, len(self.router.users))

    def load_bank(self, adapter_name: str, directory: str) -> None:
        """Take the records saved in `directory/bank` in place of those here."""
        working_set = self.router.working_sets[adapter_name]
        working_set.store.registry_id = self.router.users.registry_id
        working_set.load(directory, len(self.router.users))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # after deepcopy. Not `__deepcopy__`: PeftModel, which hands unknown names on to us, would take it for its own.
        super().__setstate__(state)
        for adapter_name in self.router.working_sets:  # the copy saves its own bank
            self.peft_config[adapter_name].save_bank = functools.partial(self.save_bank, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        working_set = self.router.working_sets.pop(adapter_name, None)
        if working_set is not None:
            working_set.store.close()

    def _apply(self, *args: Any, **kwargs: Any) -> "ShareLoraModel":
        """The working set's tensors are no Parameters; they go where the shared factors go."""
        super()._apply(*args, **kwargs)
        self._place_working_sets()
        return self

    def _place_working_sets(self) -> None:
        for module in self.model.modules():
            if isinstance(module, ShareLoraLayer):
                for adapter_name in module.share:
                    bank = module.bank(adapter_name)
                    device = next(module.sharelora_common[adapter_name].parameters()).device
                    if isinstance(bank, SlotBank) and bank.working_set is not None and device.type != "meta":
                        bank.working_set.to(device)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        route = self.router.current()
        for name, module in list(model.named_modules()):
            if isinstance(module, PersonalHead):
                model.set_submodule(name, module.of_user(-1 if route is None else int(route.user_index[0])))
        for hook in self._hooks:
            hook.remove()
        return model

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        self._check_has_users(peft_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    @staticmethod
    def _check_has_users(config: PeftConfig) -> None:
        if not config.users:
            raise ConfigError(
                "This ShareLoraConfig has no users, so there is nobody to give a row to. The trainers of this package fill them "
                'in from the data; elsewhere give them: ShareLoraConfig(users=["ann", "bob"]). A saved config brings them '
                "along when read with ShareLoraConfig.from_pretrained or PeftModel.from_pretrained."
            )

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        self._check_has_users(config)
        if config.users != self.router.users:
            raise ConfigError(
                f"The new adapter has {len(config.users)} users, the model's other adapters have {len(self.router.users)}, or in "
                "another order; one batch is routed once for all of them. Give both the same UserRegistry."
            )

    def _create_and_replace(
        self,
        peft_config: ShareLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ShareLoraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = Linear(target, adapter_name, peft_config, self.router)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trainable by itself
        self._replace_module(parent, target_name, new_module, target)

    # -- saving and loading ----------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """PEFT's selection; users who were added to the registry and have no row yet get their D = 0."""
        state_dict = kwargs.get("state_dict", args[0] if args else {})
        for key in [key for key in state_dict if key.endswith(f".modules_to_save.{adapter_name}{HEAD_MOVES}")]:
            # in place: PEFT goes on with the same dictionary for the heads
            state_dict[key] = _with_rows(state_dict[key], len(config.users))
        selected = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        bank = f".sharelora_{PERSONAL_FACTOR[config.share]}.{adapter_name}.weight"
        for key, tensor in selected.items():
            if key.endswith(bank):
                selected[key] = _with_rows(tensor, len(config.users))
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's mapping of keys, then the checks PEFT leaves out: all tensors there, of the right shape, finite."""
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        present = model.state_dict()
        expected = [key for key in present if ".sharelora_" in key and f".{adapter_name}." in key]
        problems = [f"{key}: missing in the file" for key in expected if key not in loaded]
        for key, value in loaded.items():
            if ".sharelora_" in key and key not in present:
                problems.append(f"{key}: the model has no such tensor")
            elif key in present and value.shape != present[key].shape:
                problems.append(f"{key}: {tuple(value.shape)} in the file, {tuple(present[key].shape)} in the model")
            elif value.is_floating_point() and not value.isfinite().all():
                problems.append(f"{key}: NaN or Inf in the file")
        if problems:
            more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise AdapterMismatchError(
                f"The saved adapter does not fit this model; {len(problems)} tensor(s) differ:\n  "
                + "\n  ".join(problems[:8])
                + more
                + f"\nThe adapter was trained on {config.base_model_name_or_path!r} with r={config.r}, share={config.share!r}, "
                f"{config.num_users} users. Load it onto that base; if the base is right, the file is damaged or of "
                "another run: take it from a backup."
            )
        return loaded

    # -- generation and merging ---------------------------------------------------------------------------------------------

    def generate(self, *args: Any, user_ids: Any = None, unseen: str = "raise", **kwargs: Any) -> Any:
        """The base model's `generate`, each prompt for its own user.

        Args:
            user_ids (`list[str]` or `torch.Tensor`, *optional*):
                One user per prompt. By default those of the open route.
            unseen (`str`, *optional*, defaults to `"raise"`):
                As in [`use_users`].

        Raises:
            RoutingError: no users are given and no route is open.
        """
        route = self.router.current() if user_ids is None else self.router.resolve(user_ids, unseen)
        if route is None:
            return self.model.generate(
                *args, **kwargs
            )  # the first layer says what is missing; without adapters none is
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        copies = 1
        for name in ("num_beams", "num_return_sequences"):
            value = kwargs.get(name, getattr(config, name, None))
            copies = max(copies, value or 1)
        # generate repeats each prompt for its beams, neighbours together
        expanded = Route(route.user_index.repeat_interleave(copies), route.has_unseen) if copies > 1 else route
        with self.router.use(expanded):
            return self.model.generate(*args, **kwargs)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        user: str | int | None = None,
    ) -> nn.Module:
        """
        The base model with one user's adapter merged in; all other users are gone from it.

        Args:
            progressbar (`bool`, *optional*, defaults to `False`):
                Show progress.
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the merged weights for NaN.
            adapter_names (`list[str]`, *optional*):
                Which adapters; by default the active ones.
            user (`str` or `int`, *optional*):
                Whose: his id, or his row. Needed when there is more than one user. A 4-bit base loses most of a
                user's taste when its merged weights are quantised again; export the user instead.

        Raises:
            RoutingError: no user is given and there are several.
            UnknownUserError: the user is not in the registry.
        """
        if user is None:
            if len(self.router.users) != 1:
                raise RoutingError(
                    f"This adapter has {len(self.router.users)} users; their factors cannot be merged together. Say whose: "
                    'merge_and_unload(user="ann").'
                )
            row = 0
        elif isinstance(user, str):
            row = self.router.users.index([user])[0]
        elif isinstance(user, int) and 0 <= user < len(self.router.users):
            row = user
        else:
            raise UnknownUserError(
                f"user={user!r}; an id (text) or a row from 0 to {len(self.router.users) - 1} is needed."
            )
        with self.router.use(Route(torch.tensor([row]), has_unseen=False)):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def grow_users(self) -> None:
        """Give rows to users that were added to the registry; all other rows stay bit-identical."""
        for module in self.model.modules():
            if isinstance(module, ShareLoraLayer):
                for adapter_name in module.share:
                    module.bank(adapter_name).grow(len(self.router.users))
            elif isinstance(module, PersonalHead):
                module.moves.grow(len(self.router.users))
        self.router.rows = len(self.router.users)


def make_value_head(model: nn.Module) -> None:
    """Put a critic beside a causal model: a linear map from its last hidden state to a value, in float32.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
    """
    hidden = model.config.get_text_config().hidden_size
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
    head = Float32Linear(hidden, 1, bias=False, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)  # all values 0: the first advantages are the returns
    model.add_module(VALUE_HEAD, head)


def _with_rows(moves: torch.Tensor, users: int) -> torch.Tensor:
    """`(rows, ...)` -> `(users, ...)`: whoever has no row yet has not moved."""
    missing = users - len(moves)
    return moves if missing <= 0 else torch.cat([moves, moves.new_zeros(missing, *moves.shape[1:])])
