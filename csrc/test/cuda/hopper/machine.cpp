// The scheduler of the modelled machine, its copies and its products.
#define NLK_HOPPER_EMULATION
#include "test/cuda/hopper/machine.h"

#include <algorithm>

namespace nlk::cuda::hopper {

namespace machine {

Machine* current = nullptr;

namespace {

constexpr std::size_t kStack = 64 * 1024;
const std::function<void()>* entry = nullptr;
std::string failure;

void start() {
  Fiber* fiber = current->fiber;
  try {
    (*entry)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  fiber->done = true;
}

}  // namespace

void Machine::run(int blocks, int cluster_blocks, int threads, const std::function<void()>& kernel) {
  current = this;
  entry = &kernel;
  blocks_of_grid = blocks;
  cluster_size = cluster_blocks;
  for (int first = 0; first < blocks; first += cluster_size) run_cluster(first, threads);
}

void Machine::create(Fiber& made, int thread) {
  made.stack.reset(new std::uint8_t[kStack]);
  made.block = cluster.back().get();
  made.warp = warps_.back().get();
  made.thread = thread;
  getcontext(&made.context);
  made.context.uc_stack.ss_sp = made.stack.get();
  made.context.uc_stack.ss_size = kStack;
  made.context.uc_link = &scheduler_;
  makecontext(&made.context, start, 0);
}

void Machine::run_cluster(int first, int threads) {
  cluster.clear();
  fibers_.clear();
  warps_.clear();
  copies_.clear();
  syncs_.clear();
  failure.clear();
  for (int rank = 0; rank < cluster_size; ++rank) {
    cluster.push_back(std::make_unique<Block>());
    cluster.back()->index = first + rank;
    cluster.back()->rank = rank;
    for (int thread = 0; thread < threads; ++thread) {
      if (thread % 32 == 0) warps_.push_back(std::make_unique<Warp>());
      fibers_.push_back(std::make_unique<Fiber>());
      create(*fibers_.back(), thread);
    }
  }
  // Rounds begin at a drawn warp, so that any of them may be ahead of the others.
  std::size_t left = fibers_.size();
  const Warp* slow = nullptr;
  while (left > 0) {
    bool moved = false;
    // Now and then another warp falls behind.
    if (draw(32)) slow = warps_[random_() % warps_.size()].get();
    const std::size_t offset = random_() % warps_.size() * 32;
    const std::size_t rounds = draw(2) ? fibers_.size() : 32;
    for (std::size_t i = 0; i < rounds; ++i) {
      Fiber& next = *fibers_[(offset + i) % fibers_.size()];
      if (next.done || (next.ready && !next.ready())) continue;
      // Whoever is held back could go on: that is no deadlock.
      if (next.turns_left > 0 || (next.warp == slow && !draw(16))) {
        next.turns_left -= next.turns_left > 0;
        moved = true;
        continue;
      }
      next.ready = nullptr;
      fiber = &next;
      swapcontext(&scheduler_, &next.context);
      moved = true;
      if (!failure.empty()) throw std::runtime_error(failure);
      left -= next.done;
    }
    if (!copies_.empty() && (draw(3) || (!moved && rounds == fibers_.size()))) {
      land(random_() % copies_.size());
      moved = true;
    }
    if (!moved && rounds == fibers_.size() && left > 0) throw std::runtime_error("deadlock");
  }
  if (!copies_.empty()) throw std::runtime_error("a block ended before its copies had landed");
  for (const auto& block : cluster) {
    for (const auto& [address, barrier] : block->barriers) {
      if (barrier.pending != barrier.expected || barrier.bytes != 0)
        throw std::runtime_error("a block ended in the middle of a barrier's phase");
    }
  }
}

void Machine::sync(bool of_cluster) {
  const int who = of_cluster ? -1 : fiber->block->rank;
  auto& [arrived, generation] = syncs_[who];
  const std::uint64_t before = generation;
  const std::size_t all = fibers_.size() / (of_cluster ? 1 : cluster.size());
  if (static_cast<std::size_t>(++arrived) == all) {
    arrived = 0;
    ++generation;
    return;
  }
  const std::uint64_t* now = &generation;
  wait_until([now, before] { return *now != before; });
}

void Machine::arrive(Block& block, std::uint32_t address, int arrivals, std::int64_t bytes) {
  Barrier& barrier = block.barriers.at(address);
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending < 0) throw std::runtime_error("more arrivals at a barrier than it expects");
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    barrier.phase ^= 1;
  }
}

void Machine::pause() {
  fiber->turns_left = static_cast<int>(random_() % 6);
  if (fiber->turns_left > 0) swapcontext(&fiber->context, &scheduler_);
}

void Machine::check_published() const {
  for (const auto& other : fibers_) {
    if (other->warp == fiber->warp && other->dirty)
      throw std::runtime_error("stores are handed on without a proxy fence");
  }
}

void Machine::issue(Copy copy) {
  const int bytes = copy.map->box[0] * copy.map->box[1] * 2;
  if (copy.destination % kAtomBytes != 0) throw std::runtime_error("a copy's target is no multiple of an atom");
  if (copy.map->box[0] != kLineNumbers) throw std::runtime_error("a box's line is not 128 bytes");
  for (auto& block : cluster) {
    if ((copy.blocks >> block->rank & 1) == 0) continue;
    block->barriers.at(copy.barrier);
    std::memset(block->at(copy.destination, bytes), 0xff, bytes);
  }
  copies_.push_back(copy);
}

void Machine::land(std::size_t which) {
  const Copy copy = copies_[which];
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(which));
  const TensorMap& map = *copy.map;
  for (auto& block : cluster) {
    if ((copy.blocks >> block->rank & 1) == 0) continue;
    for (int line = 0; line < map.box[1]; ++line) {
      for (int i = 0; i < map.box[0]; ++i) {
        const std::int64_t at[3] = {copy.at[0] + i, copy.at[1] + line, copy.at[2]};
        std::uint16_t number = 0;
        std::int64_t from = 0;
        bool inside = true;
        for (int d = 0; d < 3; ++d) {
          inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
          from += at[d] * map.strides[d];
        }
        if (inside) number = map.data[from];
        // The hardware swizzles addresses, not offsets in a box.
        const std::uint32_t to = swizzle(copy.destination + static_cast<std::uint32_t>(line * 128 + 2 * i));
        std::memcpy(block->at(to, 2), &number, 2);
      }
    }
    arrive(*block, copy.barrier, 0, -static_cast<std::int64_t>(map.box[0]) * map.box[1] * 2);
  }
}

void Machine::multiply(const Block& block, Warp& warp, const Product& product, int warp_of_group) {
  const int columns = product.columns;
  auto& memory = const_cast<Block&>(block);
  const auto element = [&](std::uint64_t desc, bool transposed, int outer, int summed) {
    std::uint16_t number;
    std::memcpy(&number, memory.at(operand_address(desc, transposed, outer, summed), 2), 2);
    return widened(number, product.bfloat);
  };
  float a[16][16] = {};
  std::vector<float> b(16 * static_cast<std::size_t>(columns));
  for (int row = 0; row < 16 && !product.in_registers; ++row)
    for (int k = 0; k < 16; ++k)
      a[row][k] = element(product.a, product.transpose_a, 16 * warp_of_group + row, k);
  for (int lane = 0; lane < 32 && product.in_registers; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h)
        a[operand_row(lane, r)][operand_column(lane, r, h)] =
            widened(static_cast<std::uint16_t>(product.registers[lane][r] >> 16 * h), product.bfloat);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n)
      b[static_cast<std::size_t>(k * columns + n)] = element(product.b, product.transpose_b, n, k);

  std::vector<float> c(16 * static_cast<std::size_t>(columns));
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) c[row * columns + n] += a[row][k] * b[k * columns + n];
  std::vector<float>& sums = warp.flying.at(product.sums[0]);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      float& sum = sums[static_cast<std::size_t>(lane * columns / 2 + i)];
      const float added = c[static_cast<std::size_t>(fragment_row(lane, i) * columns + fragment_column(lane, i))];
      sum = product.accumulate ? sum + added : added;
    }
  }
}

void Machine::complete_products(Warp& warp, std::size_t kept) {
  while (warp.groups.size() > kept) {
    const std::vector<Product> group = std::move(warp.groups.front());
    warp.groups.pop_front();
    for (const Product& product : group) {
      for (int lane = 0; lane < 32 && product.in_registers; ++lane) {
        if (std::memcmp(product.copied[lane], product.registers[lane], 16) != 0)
          throw std::runtime_error("a register operand was overwritten in flight");
      }
      multiply(*fiber->block, warp, product, fiber->thread % kWarpgroup / 32);
    }
    for (const Product& product : group) {
      const auto flying = warp.flying.find(product.sums[0]);
      const auto again = [&product](const std::vector<Product>& later) {
        return std::any_of(later.begin(), later.end(), [&product](const Product& other) {
          return other.sums[0] == product.sums[0];
        });
      };
      if (flying == warp.flying.end() || again(warp.open) ||
          std::any_of(warp.groups.begin(), warp.groups.end(), again))
        continue;
      const std::size_t count = product.columns / 2;
      for (int lane = 0; lane < 32; ++lane) {
        float* sums = product.sums[lane];
        if (!std::all_of(sums, sums + count, [](float sum) { return std::isnan(sum); }))
          throw std::runtime_error("accumulators were written in flight");
        std::memcpy(sums, flying->second.data() + static_cast<std::size_t>(lane) * count, count * 4);
      }
      warp.flying.erase(flying);
    }
  }
}

}  // namespace machine

void barrier_arrive(std::uint32_t barrier) {
  barrier_arrive_at(barrier, machine::current->fiber->block->rank);
}

void barrier_arrive_at(std::uint32_t barrier, int rank) {
  machine::Machine& machine = *machine::current;
  machine.check_published();
  machine.arrive(*machine.cluster.at(static_cast<std::size_t>(rank)), barrier, 1, 0);
  machine.pause();
}

void wgmma_commit() {
  machine::Warp* warp = machine::current->fiber->warp;
  machine::current->meet([warp] {
    warp->groups.push_back(std::move(warp->open));
    warp->open.clear();
    if (machine::current->draw(2)) machine::current->complete_products(*warp, 0);
  });
}

void wgmma_wait_for(std::size_t pending) {
  machine::Warp* warp = machine::current->fiber->warp;
  machine::current->meet([warp, pending] { machine::current->complete_products(*warp, pending); });
}

}  // namespace nlk::cuda::hopper
