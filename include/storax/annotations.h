// Clang's thread-safety annotations; they expand to nothing under other compilers.
#pragma once

#if defined(__clang__)
#define STORAX_ANNOTATE(x) __attribute__((x))
#else
#define STORAX_ANNOTATE(x)
#endif

#define STORAX_CAPABILITY(name) STORAX_ANNOTATE(capability(name))
#define STORAX_SCOPED_CAPABILITY STORAX_ANNOTATE(scoped_lockable)
#define STORAX_GUARDED_BY(mutex) STORAX_ANNOTATE(guarded_by(mutex))
#define STORAX_REQUIRES(mutex) STORAX_ANNOTATE(requires_capability(mutex))
#define STORAX_ACQUIRE(...) STORAX_ANNOTATE(acquire_capability(__VA_ARGS__))
#define STORAX_RELEASE(...) STORAX_ANNOTATE(release_capability(__VA_ARGS__))
#define STORAX_NO_ANALYSIS STORAX_ANNOTATE(no_thread_safety_analysis)
