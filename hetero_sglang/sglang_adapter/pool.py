"""SGLang's KV pool with resident heads only.

Token ids, allocator and request table stay SGLang's. Rows of resident heads lie
head-major, [num_planes, num_slots, head_dim], so that one head of a request streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from hetero_sglang.cache.memory import allocate_pool
from hetero_sglang.errors import ConfigError, ResidencyError

if TYPE_CHECKING:
    from hetero_sglang.cache.sizing import PoolShape
    from hetero_sglang.sglang_adapter.setup import Setup


class HeteroKVPool(MHATokenToKVPool):
    """Resident pool; knows the sizes of the other areas for SGLang's reports.

    Attributes:
        k_resident: Keys, [num_planes, num_slots, head_dim].
        v_resident: Values, same shape.
        setup: Settings of this process.
        shape: Sizes of all areas.
    """

    setup: ClassVar[Setup]
    shape: PoolShape

    def _create_buffers(self) -> None:
        if self.post_capture_active:
            raise ConfigError(
                "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING resizes KV pools after CUDA graphs were "
                "captured, which --kv-policy heterocache cannot follow; set it to 0"
            )
        setup = self.setup
        self.shape = setup.rule.shape_for(self.size)
        dims = (setup.tables.num_planes, self.size + self.page_size, setup.head_dim)
        self.k_resident = allocate_pool(dims, self.store_dtype, self.device)
        self.v_resident = allocate_pool(dims, self.store_dtype, self.device)
        # Views a layer, for code of SGLang that only counts or names buffers.
        self.k_buffer = [self.k_resident[heads.planes] for heads in setup.tables.layers]
        self.v_buffer = [self.v_resident[heads.planes] for heads in setup.tables.layers]
        self.k_scale_buffer = self.v_scale_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self._kv_buffer_descs: list[Any] = []
        self._init_data_ptrs_and_strides()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of K and of V in all four areas."""
        half = self.shape.total_bytes // 2
        return half, half

    def _refuse(self, what: str) -> NoReturn:
        raise ResidencyError(
            f"{what} reads the stock KV layout, which --kv-policy heterocache does not have"
        )

    def set_kv_buffer(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the attention backend writes by head."""
        self._refuse("set_kv_buffer")

    def get_key_buffer(self, layer_id: int) -> NoReturn:
        """Refused: there is no tensor with all heads of a layer."""
        self._refuse(f"get_key_buffer({layer_id})")

    def get_value_buffer(self, layer_id: int) -> NoReturn:
        """Refused: there is no tensor with all heads of a layer."""
        self._refuse(f"get_value_buffer({layer_id})")

    def get_cpu_copy(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a token's rows are not in one place."""
        self._refuse("get_cpu_copy")

    def load_cpu_copy(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: a token's rows are not in one place."""
        self._refuse("load_cpu_copy")

    def get_contiguous_buf_infos(self) -> NoReturn:
        """Refused: KV transfer between servers is not supported."""
        self._refuse("get_contiguous_buf_infos")

    def get_device_pool_infos(self) -> NoReturn:
        """Refused: host tiers of SGLang are not supported."""
        self._refuse("get_device_pool_infos")

    def move_kv_cache(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: rows of compressed heads are not addressed by token id."""
        self._refuse("move_kv_cache")
