// Runs kernels that were compiled against the shim. An invocation is a fiber, which yields at barriers and simdgroup functions only.
//
// A request on standard input, all numbers little-endian:
//   u32 length, library; u32 length, symbol; u32 workgroups[3]; u32 number of buffers; each: u64 size, u32 flags, bytes;
//   u32 number of orders; each: u64 order
// Flags: 1 the kernel may write the buffer. Order 0: invocations and workgroups in order; 1: reversed; any other: the seed of a random
// order. A kernel runs once per order, and all runs must leave the same bytes.
// The answer on standard output: u32 0, then the bytes of the buffers that may be written; or u32 length, the reason why it failed.
#include <metal_stdlib>
#undef kernel
#undef device
#undef threadgroup
#undef constant
#undef thread
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TSAN 1
extern "C" { void* __tsan_create_fiber(unsigned); void __tsan_destroy_fiber(void*); void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber(); void __tsan_acquire(void*); void __tsan_release(void*); }
#endif
#if __has_feature(address_sanitizer)
#define ASAN 1
extern "C" { void __sanitizer_start_switch_fiber(void**, const void*, size_t); void __sanitizer_finish_switch_fiber(void*, const void**, size_t*); }
#endif
#if __has_feature(memory_sanitizer)
#define MSAN 1
#include <sanitizer/msan_interface.h>
#endif
#endif
#ifndef TSAN
#define TSAN 0
#endif
#ifndef ASAN
#define ASAN 0
#endif
#ifndef MSAN
#define MSAN 0
#endif

// A context is where its stack ends; swapcontext would do, at a system call a switch.
#if defined(__x86_64__)
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Context {
    void* top;
    void start(char* stack, size_t size, void (*body)()) {
        void** p = reinterpret_cast<void**>(stack + size) - 1; // where a return address would be
        *--p = reinterpret_cast<void*>(body);
        for (int i = 0; i < 6; i++) *--p = nullptr;
        top = p;
    }
};
static void change(Context& from, Context& to) { shim_switch(&from.top, to.top); }
#else
struct Context {
    ucontext_t context;
    void start(char* stack, size_t size, void (*body)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = size, context.uc_link = nullptr;
        makecontext(&context, body, 0);
    }
};
static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif
#define HIDDEN __attribute__((no_sanitize("thread"), noinline))

namespace {
constexpr size_t STACK = 512 << 10; // sanitizers need much; pages that are never touched cost nothing
constexpr uint LANES = 32;
enum State { Ready, Group, Simd, Done };
struct Fiber {
    Context context;
    shim::Call call;
    State state;
    int line;
    const void* pointer; // of a uniform operation
    long number;
    shim::Lane lane;
    void (*f)(shim::Lane*);
    char* stack;
    void* tsan;
    void* fake;
    unsigned barriers, simd_barriers;
};
std::vector<Fiber> fibers;
uint threads, current;
const shim::Kernel* running;
Context scheduler;
void* scheduler_tsan;
void* scheduler_fake;
const void* scheduler_stack;
size_t scheduler_size;
uint64_t order, rng;
char group_end, group_sync[2], simd_sync[32][2]; // two in turn, so that nobody acquires what was released at a later barrier

HIDDEN uint64_t random_number() {
    rng += 0x9e3779b97f4a7c15;
    uint64_t z = rng;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

char* new_stack() {
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    mprotect(stack, 4096, PROT_NONE); // an overflow ends the process
    return static_cast<char*>(stack);
}

void answer(const std::string& reason) {
    uint length = reason.size();
    fwrite(&length, 4, 1, stdout);
    fwrite(reason.data(), 1, length, stdout);
    fflush(stdout);
}

/// Ends the process: fibers cannot be unwound.
HIDDEN void fail(const char* what) {
    char text[512];
    const Fiber& at = fibers[current];
    snprintf(text, sizeof text, "%s: order %lu, workgroup %u %u %u, invocation %u, line %d", what, order, at.call.group.x, at.call.group.y,
             at.call.group.z, current, at.line);
    answer(text);
    _exit(3);
}

HIDDEN void yield() {
    Fiber& me = fibers[current];
#if ASAN
    __sanitizer_start_switch_fiber(&me.fake, scheduler_stack, scheduler_size);
#endif
#if TSAN
    __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
    change(me.context, scheduler);
#if ASAN
    __sanitizer_finish_switch_fiber(me.fake, nullptr, nullptr);
#endif
}

HIDDEN void body() {
    Fiber& me = fibers[current];
#if ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    running->invoke(me.call);
    me.state = Done;
#if TSAN
    __tsan_release(&group_end);
#endif
#if ASAN
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
#endif
#if TSAN
    __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
    change(me.context, scheduler);
}

/// Waits for the lanes of the simdgroup; the last to come runs `f`.
HIDDEN void rendezvous(int line, void (*f)(shim::Lane*), const void* pointer, long number) {
    Fiber& me = fibers[current];
    uint first = current / LANES * LANES, end = std::min(first + LANES, threads);
    me.state = Simd, me.line = line, me.pointer = pointer, me.number = number, me.f = f;
    for (uint i = first; i < end; i++) {
        if (fibers[i].state == Done || fibers[i].state == Group) fail("a simdgroup function that not all lanes reach");
        if (fibers[i].state == Ready) { yield(); return; }
    }
    shim::Lane lanes[LANES];
    for (uint i = first; i < end; i++) {
        Fiber& other = fibers[i];
        if (other.line != line || other.f != f) fail("lanes of a simdgroup at different functions");
        if (other.pointer != pointer || other.number != number) fail("lanes of a simdgroup with different arguments");
        lanes[i - first] = other.lane;
    }
    if (f) {
        if (end - first != LANES) fail("a simdgroup function of an incomplete simdgroup");
        f(lanes);
    }
    for (uint i = first; i < end; i++) fibers[i].state = Ready;
}

HIDDEN void run_group(const shim::Kernel& k, metal::uint3 groups, metal::uint3 group, void* const* buffers, const void* sizes) {
    auto& shared = *new std::vector<void*>; // neither it nor its memory is freed for the race detector: no workgroup waits for another
    for (const shim::Shared* s = k.shared; s->name; s++) {
        void* p = aligned_alloc(std::max<size_t>(s->align, 16), (s->size + 15) / 16 * 16);
        if (ASAN) { free(p); p = malloc(s->size); } // exact, for the redzone
        memset(p, order % 3 == 0 ? 0xff : order % 3 == 1 ? 0x7b : 0xaa, s->size);
#if MSAN
        __msan_poison(p, s->size);
#endif
        shared.push_back(p);
    }
    for (uint i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        uint x = i % k.size[0], y = i / k.size[0] % k.size[1], z = i / k.size[0] / k.size[1];
        metal::uint3 local(x, y, z), size(k.size[0], k.size[1], k.size[2]);
        f.call = {buffers, shared.data(), sizes, group, local, group * size + local, groups, i, i / LANES, i % LANES, LANES, (threads + LANES - 1) / LANES};
        f.state = Ready, f.fake = nullptr, f.barriers = f.simd_barriers = 0;
        if (TSAN) f.stack = new_stack(); // what one workgroup left there is nothing to the next
        f.context.start(f.stack, STACK, body);
#if TSAN
        f.tsan = __tsan_create_fiber(0);
#endif
    }
    std::vector<uint> ready;
    for (;;) {
        ready.clear();
        uint done = 0, waiting = 0;
        for (uint i = 0; i < threads; i++) {
            if (fibers[i].state == Ready) ready.push_back(i);
            done += fibers[i].state == Done;
            waiting += fibers[i].state == Group;
        }
        if (done == threads) break;
        if (ready.empty()) {
            if (waiting != threads) fail("a barrier that not all invocations reach");
            for (uint i = 0; i < threads; i++) {
                if (fibers[i].line != fibers[0].line) fail("invocations at different barriers");
                fibers[i].state = Ready;
            }
            continue;
        }
        // One simdgroup after the other, each as far as it gets: what only their functions keep in step comes apart.
        if (order < 2) {
            uint group = (order == 0 ? ready.front() : ready.back()) / LANES;
            std::erase_if(ready, [&](uint i) { return i / LANES != group; });
        }
        if (order == 1) std::reverse(ready.begin(), ready.end());
        if (order > 1) for (size_t i = ready.size(); i > 1; i--) std::swap(ready[i - 1], ready[random_number() % i]);
        for (uint i : ready) {
            if (fibers[i].state != Ready) continue;
            current = i;
#if ASAN
            __sanitizer_start_switch_fiber(&scheduler_fake, fibers[i].stack, STACK);
#endif
#if TSAN
            __tsan_switch_to_fiber(fibers[i].tsan, 1);
#endif
                    change(scheduler, fibers[i].context);
#if ASAN
            __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
        }
    }
#if TSAN
    // Not those that an earlier kernel with more invocations had.
    for (uint i = 0; i < threads; i++) __tsan_destroy_fiber(fibers[i].tsan), munmap(fibers[i].stack, STACK);
#endif
#if !TSAN
    for (void* p : shared) free(p);
    delete &shared;
#endif
}
} // namespace

namespace shim {
HIDDEN uint lane() { return fibers[current].call.lane; }

HIDDEN void barrier(bool whole, int flags, int line) {
    Fiber& me = fibers[current];
    char* sync = whole ? &group_sync[me.barriers++ % 2] : &simd_sync[current / LANES][me.simd_barriers++ % 2];
    (void)sync;
#if TSAN
    if (flags) __tsan_release(sync);
#endif
    if (whole) {
        me.state = Group, me.line = line;
        yield();
    } else {
        rendezvous(line, nullptr, nullptr, -1);
    }
#if TSAN
    if (flags) __tsan_acquire(sync);
#endif
}

HIDDEN void together(const Lane& mine, int line, void (*f)(Lane*)) {
    fibers[current].lane = mine;
    rendezvous(line, f, nullptr, 0);
}

HIDDEN void uniform(const void* pointer, long number, int line) { rendezvous(line, nullptr, pointer, number); }
} // namespace shim

namespace {
struct Buffer {
    uint flags;
    std::vector<char> bytes;
    void* memory;
};

void read(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) _exit(0); // the other side is gone
}
template <class T> T number() {
    T x;
    read(&x, sizeof x);
    return x;
}
std::string text() {
    std::string s(number<uint>(), ' ');
    read(s.data(), s.size());
    return s;
}

const shim::Kernel* load(const std::string& library, const std::string& symbol) {
    static std::map<std::string, void*> loaded;
    void*& handle = loaded[library];
    if (!handle) handle = dlopen(library.c_str(), RTLD_NOW);
    auto* found = handle ? dlsym(handle, symbol.c_str()) : nullptr;
    if (!found) {
        answer(std::string("cannot load the kernel: ") + dlerror());
        _exit(3);
    }
    return static_cast<const shim::Kernel*>(found);
}

void dispatch(const shim::Kernel& kernel, metal::uint3 groups, std::vector<Buffer>& buffers) {
    running = &kernel;
    rng = order;
    std::vector<void*> memory;
    std::vector<uint> sizes;
    for (Buffer& b : buffers) {
        // Memory of its own of exactly its size, so that an access behind it is seen.
        void* p = nullptr;
        if (posix_memalign(&p, 256, b.bytes.size())) abort();
        memcpy(p, b.bytes.data(), b.bytes.size());
#if MSAN
        __msan_unpoison(p, b.bytes.size());
#endif
        b.memory = p;
        memory.push_back(p);
        sizes.push_back(b.bytes.size());
    }
    sizes.resize(64);
    threads = kernel.size[0] * kernel.size[1] * kernel.size[2];
    if (fibers.size() < threads) {
        size_t known = fibers.size();
        fibers.resize(threads);
        for (size_t i = known; i < threads; i++) fibers[i].stack = new_stack();
    }
    std::vector<metal::uint3> all;
    for (uint z = 0; z < groups.z; z++)
        for (uint y = 0; y < groups.y; y++)
            for (uint x = 0; x < groups.x; x++) all.push_back(metal::uint3(x, y, z));
    if (order == 1) std::reverse(all.begin(), all.end());
    if (order > 1)
        for (size_t i = all.size(); i > 1; i--) std::swap(all[i - 1], all[random_number() % i]);
    for (auto group : all) run_group(kernel, groups, group, memory.data(), sizes.data());
#if TSAN
    __tsan_acquire(&group_end);
#endif
}

/// What is not as in the first run, or nothing.
std::string difference(const std::vector<Buffer>& buffers, const std::vector<std::vector<char>>& expected) {
    for (size_t i = 0; i < buffers.size(); i++) {
        const Buffer& b = buffers[i];
        const char* got = static_cast<const char*>(b.memory);
        for (size_t k = 0; k < b.bytes.size(); k++) {
            if (got[k] == expected[i][k]) continue;
            return "order " + std::to_string(order) + " leaves another byte " + std::to_string(k) + " of " + std::to_string(b.bytes.size()) +
                   " in binding " + std::to_string(i);
        }
    }
    return "";
}
} // namespace

// The argument: after how many seconds a kernel that loops for ever ends the process.
int main(int count, char** words) {
    const unsigned seconds = count > 1 ? strtoul(words[1], nullptr, 10) : 600;
#if TSAN
    scheduler_tsan = __tsan_get_current_fiber();
#endif
    for (;;) {
        alarm(0);
        std::string library = text(), symbol = text();
        alarm(seconds);
        metal::uint3 groups(0, 0, 0);
        for (int i = 0; i < 3; i++) groups[i] = number<uint>();
        std::vector<Buffer> buffers(number<uint>());
        for (Buffer& b : buffers) {
            b.bytes.resize(number<uint64_t>());
            b.flags = number<uint>();
            read(b.bytes.data(), b.bytes.size());
        }
        std::vector<uint64_t> orders(number<uint>());
        for (uint64_t& o : orders) o = number<uint64_t>();
        const shim::Kernel* kernel = load(library, symbol);
        std::vector<std::vector<char>> expected;
        std::string reason;
        for (uint64_t o : orders) {
            bool first = expected.empty();
            order = o;
            dispatch(*kernel, groups, buffers);
#if MSAN
            for (size_t i = 0; i < buffers.size(); i++) {
                long at = __msan_test_shadow(buffers[i].memory, buffers[i].bytes.size());
                if (at >= 0) reason = "byte " + std::to_string(at) + " of binding " + std::to_string(i) + " comes from uninitialised memory";
                __msan_unpoison(buffers[i].memory, buffers[i].bytes.size());
            }
#endif
            if (first)
                for (Buffer& b : buffers) expected.emplace_back(static_cast<char*>(b.memory), static_cast<char*>(b.memory) + b.bytes.size());
            else if (reason.empty())
                reason = difference(buffers, expected);
            for (Buffer& b : buffers) free(b.memory);
        }
        answer(reason);
        if (!reason.empty()) continue;
        for (size_t i = 0; i < buffers.size(); i++)
            if (buffers[i].flags & 1) fwrite(expected[i].data(), 1, expected[i].size(), stdout);
        fflush(stdout);
    }
}
