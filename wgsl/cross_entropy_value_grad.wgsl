// Value and gradient together. `lanes` invocations share a row and read it 16 bytes at a time. With `over` the derivative takes the place of
// the logits: an invocation writes what only it reads, and the one that holds the logit of the target writes the loss (docs/rejected.md).
{# Inside: row < rows; blocks are read below the stride (by the condition or `min` where the last round reaches further, up to full <= stride
   otherwise), stored below cover or width, the program's own. A target is clamped to the columns. rows is bound as in cross_entropy. scratch
   has lanes entries, of which lane + k folds < lanes are joined by the first `folds` invocations; lanes is a power of two of at least 2 folds. #}
{% if steps > 0 %}
// They keep it in registers between its sums and its derivative, {{ steps }} blocks each: every logit is read once.
{% else %}
// They read it twice, the second time from its end, which is in the cache: {{ (cover + lanes - 1) // lanes }} steps each time. Sums of {{ block }}
// blocks are added up.
{% endif %}
{% include "shared/group" %}
{% include "shared/softmax" %}
{% set log2e = 1.4426950408889634 %}
{% set each = 4 * parts %}
{% set full = cols // each %}
{% if lanes > 1 %}
{# Parts of a row after the first of two rounds of adding up. #}
{% set folds = 16 %}

var<workgroup> scratch: array<vec3<f32>, {{ lanes }}>;
var<workgroup> folded: array<vec3<f32>, {{ folds }}>;
{% endif %}

fn exponential(x: vec4<f32>, top: f32) -> vec4<f32> {
    return exp2((x - top) * {{ log2e }});
}

fn across(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}
{# Adds blocks `from`..`to`, named b and at i, to the invocation's `part`: maximum, sum of exp(x - maximum), and the sum of x where
   smoothing wants it. Only the first `full` blocks of a row hold nothing but data. #}
{% macro add(from, to, tail) %}
{% for s in range(from, to) %}
{% set masked = tail or (steps > 0 and (s + 1) * lanes > full) %}
{% for p in range(parts) %}
{% if masked %}
        let valid{{ s }}_{{ p }} = vec4<u32>(0u, 1u, 2u, 3u) + 4u * ({{ parts }}u * i{{ s }} + {{ p }}u) < vec4<u32>({{ cols }}u);
        let v{{ s }}_{{ p }} = select(vec4<f32>(LOWEST), logits_part{{ p }}(b{{ s }}), valid{{ s }}_{{ p }});
{% else %}
        let v{{ s }}_{{ p }} = logits_part{{ p }}(b{{ s }});
{% endif %}
{% endfor %}
{% endfor %}
        var most = v{{ from }}_0;
{% for s in range(from, to) %}
{% for p in range(parts) %}
        most = max(most, v{{ s }}_{{ p }});
{% endfor %}
{% endfor %}
        let top = max(part.x, max(max(most.x, most.y), max(most.z, most.w)));
        var sum = vec4<f32>();
        var plain = vec4<f32>();
{% for s in range(from, to) %}
{% set masked = tail or (steps > 0 and (s + 1) * lanes > full) %}
{% for p in range(parts) %}
{% if masked %}
        sum += select(vec4<f32>(), exponential(v{{ s }}_{{ p }}, top), valid{{ s }}_{{ p }});
{% if smoothing > 0 %}
        plain += select(vec4<f32>(), v{{ s }}_{{ p }}, valid{{ s }}_{{ p }});
{% endif %}
{% else %}
        sum += exponential(v{{ s }}_{{ p }}, top);
{% if smoothing > 0 %}
        plain += v{{ s }}_{{ p }};
{% endif %}
{% endif %}
{% endfor %}
{% endfor %}
        part = vec3<f32>(top, part.y * exp2((part.x - top) * {{ log2e }}) + across(sum), part.z + across(plain));
{% endmacro %}
{# Joins entries of an array of parts: all exponentials are independent of each other. #}
{% macro join(array, first, stride, count) %}
        var top = {{ array }}[{{ first }}].x;
{% for k in range(1, count) %}
        top = max(top, {{ array }}[{{ first }} + {{ k * stride }}u].x);
{% endfor %}
        var sum = 0.0;
        var plain = 0.0;
{% for k in range(count) %}
        {
            let other = {{ array }}[{{ first }} + {{ k * stride }}u];
            sum += other.y * exp2((other.x - top) * {{ log2e }});
            plain += other.z;
        }
{% endfor %}
{% endmacro %}
{# Derivative of block `s`, into the program. #}
{% macro derive(s) %}
{% for p in range(parts) %}
        var d{{ p }} = exponential(logits_part{{ p }}(b{{ s }}{% if parts == 2 and steps > 0 %} ^ vec4<u32>(zero){% endif %}), part.x) * weight{% if smoothing > 0 %} - even{% endif %};
        if ({{ parts }}u * i{{ s }} + {{ p }}u == target_id >> 2u) {
            d{{ p }} -= hot;
{% if over %}
            wanted = across(select(vec4<f32>(), logits_part{{ p }}(b{{ s }}), is_target));
            mine = true;
{% endif %}
        }
{% if ignore >= 0 %}
        d{{ p }} = select(vec4<f32>(), d{{ p }}, counts);
{% endif %}
{% endfor %}
{% if pairs %}
        finish_pair(row, i{{ s }}, d0, d1);
{% else %}
        finish(row, {{ parts }}u * i{{ s }}, d0);
{% if parts == 2 %}
{% if width % 2 == 0 %}
        finish(row, 2u * i{{ s }} + 1u, d1);
{% else %}
        if (2u * i{{ s }} + 1u < {{ width }}u) {
            finish(row, 2u * i{{ s }} + 1u, d1);
        }
{% endif %}
{% endif %}
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% if lanes > 1 %}
    let lane = lid;
    let row = group_id(wid);
{% else %}
    let lane = 0u;
    let row = group_id(wid) * {{ size }}u + lid;
{% endif %}
    if (row >= {{ rows }}u) {
        return;
    }
    let first = row * logits_stride;
    let given = targets_at(row);
    let counts = {% if ignore >= 0 %}given != {{ ignore }}u{% else %}true{% endif %};
{% if over %}
    // A target that does not count may be no column.
    let target_id = min(given, {{ cols - 1 }}u);
{% else %}
    let target_id = given;
    let wanted = logits_at({{ each }}u * first + min(target_id, {{ cols - 1 }}u));
{% endif %}
    let dloss = dloss_at(0u) / {% if count > 0 %}{{ count }}.0{% else %}max(count_at(0u), 1.0){% endif %};

    var part = vec3<f32>(LOWEST, 0.0, 0.0);
{% for s in range(steps) %}
    let i{{ s }} = lane + {{ s * lanes }}u;
{% if (s + 1) * lanes > stride and over %}
    var b{{ s }} = vec4<f32>();
    if (i{{ s }} < {{ stride }}u) {
        b{{ s }} = logits[first + i{{ s }}];
    }
{% elif (s + 1) * lanes > stride %}
    let b{{ s }} = logits[first + min(i{{ s }}, {{ stride - 1 }}u)];
{% else %}
    let b{{ s }} = logits[first + i{{ s }}];
{% endif %}
{% endfor %}
{# Four at a time: one rescaling for all of them, and not the whole row unpacked at once. #}
{% for from in range(0, steps, 4) %}
    {
{{ add(from, [from + 4, steps] | min, false) }}
    }
{% endfor %}
{% if steps == 0 %}
    // Four sums of blocks take turns.
    var sums = vec4<f32>();
    var plains = vec4<f32>();
    for (var begin = lane; begin < {{ full }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ full }}u);
        let before = part.x;
        part = vec3<f32>(before, 0.0, 0.0);
        for (var i0 = begin; i0 < stop; i0 += {{ lanes }}u) {
            let b0 = logits[first + i0];
{{ add(0, 1, false) }}
        }
        sums *= exp2((before - part.x) * {{ log2e }});
        sums = vec4<f32>(sums.yzw, sums.x + part.y);
        plains = vec4<f32>(plains.yzw, plains.x + part.z);
    }
    part = vec3<f32>(part.x, across(sums), across(plains));
{% if cols % each != 0 %}
    if (lane == {{ full % lanes }}u) {
        let i0 = {{ full }}u;
        let b0 = logits[first + i0];
{{ add(0, 1, true) }}
    }
{% endif %}
{% endif %}
{% if lanes > 1 %}
    scratch[lane] = part;
    workgroupBarrier();
    if (lane < {{ folds }}u) {
{{ join("scratch", "lane", folds, lanes // folds) }}
        folded[lane] = vec3<f32>(top, sum, plain);
    }
    workgroupBarrier();
    {
{{ join("folded", "0u", 1, folds) }}
        part = vec3<f32>(top, sum, plain);
    }
{% endif %}

    // Where a row has no softmax the sum is NaN, or it is 0 and the weight infinite: the derivative is NaN either way.
    let weight = dloss / part.y;
{% if parts == 2 and steps > 0 %}
    // Zero wherever there is a softmax, for the sum then holds exp(0); but compilers do not know, and so keep the halves in registers rather than what was unpacked
    // from them, which are twice as many: an eighth less time.
    let zero = select(0u, 1u, part.y < 0.5);
{% endif %}
{% if smoothing > 0 %}
    let even = dloss * {{ smoothing / cols }};
{% endif %}
    let is_target = vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(target_id & 3u);
    let hot = select(vec4<f32>(), vec4<f32>(dloss * {{ 1.0 - smoothing }}), is_target);
{% if over %}
    // The logit of the target, where it is one of this invocation's.
    var wanted = 0.0;
    var mine = false;
{% else %}
    let mine = lane == 0u;
{% endif %}
{% for s in range(steps) %}
{% if (s + 1) * lanes > cover %}
    if (i{{ s }} < {{ cover }}u) {
{% else %}
    {
{% endif %}
{{ derive(s) }}
    }
{% endfor %}
{% if steps == 0 %}
    for (var step = {{ (cover + lanes - 1) // lanes }}u; step > 0u; step--) {
        let i0 = (step - 1u) * {{ lanes }}u + lane;
        if (i0 >= {{ cover }}u) {
            continue;
        }
        let b0 = logits[first + min(i0, {{ stride - 1 }}u)];
{{ derive(0) }}
    }
{% endif %}

    if (mine) {
        // Relative to the maximum, so that large logits do not swallow a small loss.
        let loss = log(part.y) + {{ 1.0 - smoothing }} * (part.x - wanted){% if smoothing > 0 %} + {{ smoothing }} * (part.x - part.z / {{ cols }}.0){% endif %};
        rows_put(row, if_softmax(part.x + log(part.y), part.x, part.y));
        rows_put(rows_stride + row, select(0.0, if_softmax(loss, part.x, part.y), counts));
{% if pad > 0 %}
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < {{ rows + pad }}u; i++) {
                rows_put(i, 0.0);
                rows_put(rows_stride + i, 0.0);
            }
        }
{% endif %}
    }
}
