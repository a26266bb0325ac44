"""What a build of torch without CUDA lacks for backward passes over fake CUDA tensors: a current device, its one stream, and a yes.

torch asks which device is current before it so much as slices a tensor, and its autograd engine which stream a backward runs on. The
library that `build` makes answers; it must be loaded before torch first asks (LD_PRELOAD). No driver, no kernel, nothing that computes.
"""

import subprocess
from pathlib import Path

__all__ = ["build"]

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device only() { return {c10::DeviceType::CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Device getDevice() const override { return only(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, only()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct Present final : CUDAHooksInterface {
  Present(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Present)
}
"""


def build(torch_folder: Path, folder: Path) -> Path:
    """The library, compiled against the torch in `torch_folder`; raises RuntimeError without g++, or where it does not compile."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(SOURCE, encoding="ascii")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", "-o", library, source, f"-I{torch_folder / 'include'}"]
    command += [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("g++ is needed to trace for CUDA without CUDA: apt-get install g++") from None
    if outcome.returncode != 0:
        raise RuntimeError(f"g++ cannot build a device guard: {outcome.stderr[-1500:]}")
    return library
